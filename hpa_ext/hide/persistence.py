"""A HiDe model on disk: experts, projectors, anchors and settings, without the base that they belong to.

``hide.json`` names the experts by task in their order, with the settings and what the base was;
``expert-<number>.safetensors`` holds a task's expert with its projector, ``anchors.safetensors`` the anchors.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hpa_ext.checkpoints.shard_files import is_plain_name
from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.checks import check_parts
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.experts import Expert, ExpertUpdate, expert_modules
from hpa_ext.hide.tensor_files import new_directory, read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    from hpa_ext.hide.model import HiDeModel

SETTINGS_FILE, ANCHORS_FILE = "hide.json", "anchors.safetensors"
_FORMAT = 1
_PROJECTOR = "projector:"


def save(model: HiDeModel, directory: str | Path) -> Path:
    """Write a HiDe model into a new directory, whole or not at all; returns it.

    Raises:
        ValueError: the directory exists and is not empty.
        OSError: it cannot be written.
    """
    return save_parts(directory, model.experts, model.anchors, model.config, model.features.describe(), model.model)


def save_parts(
    directory: str | Path,
    experts: list[Expert],
    anchors: Anchors | None,
    config: HiDeConfig,
    features: dict[str, Any] | None,
    base: nn.Module,
) -> Path:
    """As `save`, of the parts; `base` may be a skeleton."""
    with new_directory(directory) as unfinished:
        files = {expert.task: f"expert-{number:04d}.safetensors" for number, expert in enumerate(experts)}
        for expert in experts:
            write_expert(unfinished / files[expert.task], expert)
        if anchors is not None:
            anchors.save(unfinished / ANCHORS_FILE)
        settings = {
            "format": _FORMAT,
            "experts": files,
            "config": config.to_dict(),
            "features": features,
            "base": {"class": type(base).__name__, "name": getattr(getattr(base, "config", None), "name_or_path", "")},
        }
        _write_settings(unfinished, settings)
    return Path(directory)


def add_expert(
    directory: str | Path,
    expert: Expert,
    base: nn.Module,
    anchors: Anchors | None = None,
    coefficient: float | None = None,
) -> None:
    """Put one more task into a saved model.

    The settings, which name the experts, are written last: until then the directory is the model that it was.

    Args:
        directory: what `save` wrote.
        expert: of a new task.
        base: the base model, or a skeleton of it.
        anchors: holding those of the task; others in it are not looked at.
        coefficient: its fusion coefficient; None for that of the settings.

    Raises:
        ValueError: the task is there already, its anchors are missing or of other features, or the model would not fit
            together with it. Nothing was written then.
    """
    directory = Path(directory)
    experts, together, config, settings = load_parts(directory)
    check_base(directory, settings, base)
    if expert.task in settings["experts"]:
        raise ValueError(f"task: expected a new one, got {expert.task!r}; remove it first")
    if anchors is not None and expert.task not in anchors:
        raise ValueError(f"anchors: expected those of {expert.task!r}, got {', '.join(anchors.tasks) or 'none'}")
    if together is not None and anchors is None:
        raise ValueError(f"anchors: expected those of {expert.task!r}, because the others have some, got None")
    if anchors is not None:
        together = Anchors(settings["features"]) if together is None else together
        together.merge_(anchors.select([expert.task]))
        settings["features"] = settings["features"] or together.features
    if coefficient is not None:
        coefficients = {task: config.coefficient(task) for task in settings["experts"]} | {expert.task: coefficient}
        config = config.replace(fusion_coefficients=coefficients)
    check_parts(base, expert_modules(base), [*experts, expert], together, config)
    taken = set(settings["experts"].values())
    file = next(name for name in (f"expert-{n:04d}.safetensors" for n in itertools.count()) if name not in taken)
    write_expert(directory / file, expert)
    if together is not None:
        together.save(directory / ANCHORS_FILE)
    settings["experts"][expert.task] = file
    settings["config"] = config.to_dict()
    _write_settings(directory, settings)


def remove_expert(directory: str | Path, task: str) -> None:
    """Take a task out of a saved model; the settings are written first. ValueError if it is not there."""
    directory = Path(directory)
    settings = read_settings(directory)
    if task not in settings["experts"]:
        raise ValueError(f"task: expected one of {', '.join(settings['experts']) or '(none)'}, got {task!r}")
    file = settings["experts"].pop(task)
    coefficients = settings["config"]["fusion_coefficients"]
    if isinstance(coefficients, dict):
        coefficients.pop(task, None)
    _write_settings(directory, settings)
    anchors = _anchors_of(directory, settings)
    if anchors is not None:
        anchors.save(directory / ANCHORS_FILE)
    (directory / file).unlink(missing_ok=True)


def load(directory: str | Path, base: nn.Module, *, config: HiDeConfig | None = None, **options: Any) -> HiDeModel:
    """Put a saved HiDe model onto its base model.

    Args:
        directory: what `save` wrote.
        base: the plain base model; changed in place.
        config: settings to use instead of the saved ones.
        options: `features` (needed where the saved ones are CLIP's), `expert_dtype`, `base_weights`.

    Raises:
        FileNotFoundError, ValueError: not such a directory, or broken, or of another base or other features.
    """
    from hpa_ext.hide.model import HiDeModel
    from hpa_ext.hide.own_features import described_features, wants_clip

    experts, anchors, saved, settings = load_parts(directory)
    check_base(directory, settings, base)
    wanted = settings["features"]
    if options.get("features") is None and wanted is not None and not wants_clip(wanted):
        options["features"] = described_features(wanted, base, None, None, None)
    adapters = {expert.task: expert for expert in experts}
    return HiDeModel(base, adapters, anchors, config or saved, **options)


def load_parts(directory: str | Path) -> tuple[list[Expert], Anchors | None, HiDeConfig, dict[str, Any]]:
    """Experts, anchors, configuration, and the settings file, of a saved HiDe model."""
    directory = Path(directory)
    settings = read_settings(directory)
    experts = []
    for task, name in settings["experts"].items():
        file = directory / name
        expert = read_saved_expert(file)
        if expert.task != task:
            raise ValueError(f"{file}: expected the expert of {task!r}, got {expert.task!r}")
        experts.append(expert)
    try:
        config = HiDeConfig.from_dict(settings["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / SETTINGS_FILE}: {error}") from error
    return experts, _anchors_of(directory, settings), config, settings


def read_settings(directory: str | Path) -> dict[str, Any]:
    """The settings file of a saved HiDe model. FileNotFoundError; ValueError if it is no such file."""
    path = Path(directory) / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the directory of a saved HiDe model")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path}: expected format {_FORMAT}, got {found!r}")
    for key, kind in (("experts", dict), ("config", dict), ("base", dict), ("features", dict | None)):
        if not isinstance(settings.get(key), kind):
            raise ValueError(f"{path}: {key}: expected it as `save` writes it, got {settings.get(key)!r}")
    for task, name in settings["experts"].items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"{path}: experts: {task!r}: expected the name of a file, got {name!r}")
    return settings


def has_anchors(directory: str | Path) -> bool:
    """Whether a saved HiDe model has anchors; one that routes nothing may have none."""
    return (Path(directory) / ANCHORS_FILE).is_file()


def write_expert(path: str | Path, expert: Expert) -> Path:
    """One expert as a safetensors file: ``<module>.lora_A``, ``.lora_B``, ``.gain_change``, ``projector:<name>``."""
    tensors: dict[str, Tensor] = {}
    scaling = {}
    for name, update in expert.updates.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = update.a, update.b
        if update.gain_change is not None:
            tensors[f"{name}.gain_change"] = update.gain_change
        scaling[name] = float(update.scaling)
    for name, value in expert.projector.items():
        tensors[_PROJECTOR + name] = value
    metadata = {"hide_expert": str(_FORMAT), "task": expert.task, "scaling": json.dumps(scaling)}
    return write_tensors(path, tensors, metadata)


def read_saved_expert(path: str | Path) -> Expert:
    """What `write_expert` wrote. FileNotFoundError; ValueError if it is another file, or broken."""
    tensors, metadata = read_tensors(path)
    if metadata.get("hide_expert") != str(_FORMAT):
        raise ValueError(f"{path}: expected an expert of HiDe in format {_FORMAT}, got another safetensors file")
    try:
        task, scalings = metadata["task"], {name: float(s) for name, s in json.loads(metadata["scaling"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a task and scalings in the metadata, got {metadata}") from error
    updates = {}
    for name, scaling in scalings.items():
        try:
            a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        except KeyError as error:
            raise ValueError(f"{path}: expected A and B of {name}, got no {error}") from error
        updates[name] = ExpertUpdate(a, b, scaling, tensors.get(f"{name}.gain_change"))
    projector = {name.removeprefix(_PROJECTOR): value for name, value in tensors.items() if name.startswith(_PROJECTOR)}
    return Expert(task, updates, projector)


def _anchors_of(directory: Path, settings: dict[str, Any]) -> Anchors | None:
    """The anchors of the tasks that the settings name; the file may hold more, if adding one was cut off."""
    if not has_anchors(directory):
        return None
    return Anchors.load(directory / ANCHORS_FILE).select(list(settings["experts"]))


def check_base(directory: Path | str, settings: dict[str, Any], base: nn.Module) -> None:
    """ValueError if the settings were written for a base of another class."""
    if settings["base"].get("class") != type(base).__name__:
        raise ValueError(
            f"{directory}: expected a base of class {settings['base'].get('class')}, got {type(base).__name__}"
        )


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
