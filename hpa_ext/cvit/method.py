"""The method of a run: looked up, its options checked, and what it needs."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpa_ext.baselines import load_file, method
from hpa_ext.baselines.hpa import hpa
from hpa_ext.baselines.registry import METHODS, Method
from hpa_ext.baselines.tuning_step import TrainingMethod
from hpa_ext.hpa.config import HPAConfig

from .config import CvitConfig, MethodConfig
from .grams_needed import grams_needed

# Takes embeddings in place of tokens and images, so neither the Trainer's batches nor generation fit.
_NOT_HERE = {
    "l2p": "it puts prompts before the embeddings, which needs a model of its own; use `hpa-ext bench continual`"
}

# What a run can give a method; one that wants more would work without it in silence.
_GIVEN = {"alignment", "history"}

# Files of methods that were loaded, by the method's name.
_loaded: dict[str, Path] = {}


@dataclass(frozen=True)
class ChosenMethod:
    """A registered method with its options.

    Attributes:
        options: what its function is called with.
        hpa: the settings of HPA, None for another method.
        grams: which of "safety" and "task" it looks at.
        file: from which it was loaded; None for a method of the library.
    """

    method: Method
    options: dict[str, Any]
    hpa: HPAConfig | None = None
    grams: frozenset[str] = frozenset()
    file: Path | None = None

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def kind(self) -> str:
        """Of the method: "bound", "post-training" or "training"."""
        return self.method.kind

    @property
    def looks_back(self) -> bool:
        """Whether every step is tuned from the aligned model, and task vectors are added up."""
        return "history" in self.method.needs

    @property
    def wants_alignment(self) -> bool:
        """Whether it wants the model before the alignment."""
        return "alignment" in self.method.needs

    def training_method(self) -> TrainingMethod:
        """A new object of a training-time method; plain tuning for another one."""
        return self.method.function(**self.options) if self.kind == "training" else TrainingMethod()


def chosen_method(settings: MethodConfig) -> ChosenMethod:
    """The method of the settings.

    Raises:
        ValueError: there is none of that name, or none that works here; an option that it does not have, or a value
            that it refuses.
    """
    if settings.file is not None:
        _load(settings)
    try:
        found = method(settings.name)
    except ValueError as error:
        raise ValueError(f"method.name: {str(error).removeprefix('method: ')}") from error
    if found.name in _NOT_HERE:
        raise ValueError(f"method.name: {found.name} does not work here: {_NOT_HERE[found.name]}")
    lacking = sorted(set(found.needs) - _GIVEN)
    if lacking:
        raise ValueError(
            f"method.name: {found.name} does not work here: it needs {', '.join(lacking)}, which a run does not keep; "
            "use `hpa-ext adapter --earlier` between steps, or `hpa-ext bench continual`"
        )
    options = {**found.settings, **settings.options}
    try:
        if found.function is hpa:
            return ChosenMethod(found, options, _hpa_config(options), frozenset({"safety", "task"}))
        _check_options(found, options)
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        if found.kind == "post-training":
            return ChosenMethod(found, options, None, frozenset(grams_needed(found, options)), settings.file)
        if found.kind == "training":
            found.function(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"method.options: {error}") from error
    return ChosenMethod(found, options, file=settings.file)


def check_against(chosen: ChosenMethod, config: CvitConfig) -> None:
    """Raise ValueError if the rest of the configuration does not fit the method."""
    safety = config.calibration.safety
    if "safety" in chosen.grams and safety.source is None and safety.file is None:
        raise ValueError(
            f"calibration.safety: {chosen.name} needs a source of harmful prompts, or a file with a ready set"
        )
    if chosen.wants_alignment and config.alignment.kind == "none" and config.model.unaligned is None:
        raise ValueError(
            f"model.unaligned: {chosen.name} needs the model before its alignment: give its path, or let the run do "
            "the alignment"
        )
    if chosen.looks_back and config.tuning.projector_learning_rate is not None:
        raise ValueError(
            f"tuning.projector_learning_rate: {chosen.name} adds task vectors of the language model, each tuned from "
            "the same model; a projector that each step tunes anew would be lost. Leave it out"
        )


def _load(settings: MethodConfig) -> None:
    """Have the file register its methods. ValueError if it cannot, or its name is that of another one."""
    path = settings.file.resolve()
    if settings.name in METHODS:
        if _loaded.get(settings.name) != path:
            raise ValueError(
                f"method.file: {settings.file}: {settings.name!r} is registered already, so the file's would not be "
                "used; give it another name, or leave the file out"
            )
        return
    try:
        added = load_file(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"method.file: {str(error).removeprefix('method file: ')}") from error
    except Exception as error:  # whatever the file does
        raise ValueError(f"method.file: {settings.file}: {type(error).__name__}: {error}") from error
    _loaded.update({one.name: path for one in added})


def _hpa_config(options: dict[str, Any]) -> HPAConfig:
    known = [field.name for field in dataclasses.fields(HPAConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: HPA has no such setting; it has {', '.join(known)}")
    return HPAConfig(**options)


def _check_options(found: Method, options: dict[str, Any]) -> None:
    known: list[str] = []
    if found.function is not None:
        parameters = inspect.signature(found.function).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name}: {found.name} has no such setting; {has}")
