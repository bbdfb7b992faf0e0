"""A model of a checkpoint's class and sizes without any weights: for its module names, shapes and structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpa_ext.models.llava import architecture, from_original, is_original


def skeleton(directory: str | Path) -> nn.Module:
    """The transformers model that ``config.json`` describes, on the meta device, in evaluation mode.

    The class is ``architectures[0]``, looked up in transformers and nowhere else: code that comes with a checkpoint is
    never run. A ``config.json`` of the original LLaVA repository (``LlavaLlamaForCausalLM``) gives transformers'
    ``LlavaForConditionalGeneration``, or ``LlavaNextForConditionalGeneration`` for LLaVA-1.6. Buffers are on the meta
    device too. Parameters that the model ties are one object.

    Raises:
        FileNotFoundError: no ``config.json``.
        ValueError: it is not JSON, names no class of transformers, or is an original LLaVA's with parts that
            transformers' class lacks.
    """
    directory = Path(directory)
    config, kind = model_config(directory)
    with torch.device("meta"):
        try:
            model = kind(config)
            model.tie_weights()  # some versions leave that to loading
        except Exception as error:  # whatever a wrong value makes the class stumble over
            raise ValueError(
                f"{directory / 'config.json'}: {kind.__name__} cannot be built from it: {error}"
            ) from error
    return model.eval()


def model_config(directory: str | Path) -> tuple[Any, type[nn.Module]]:
    """The transformers configuration of the checkpoint in `directory`, and the class to build; raises as `skeleton`."""
    import transformers

    directory = Path(directory)
    path = directory / "config.json"
    raw = read_config(path)
    if is_original(raw):
        raw = from_original(raw, directory)
    name = architecture(raw)
    if name is None:
        raise ValueError(
            f"{path}: expected 'architectures' to name the model's class, got {raw.get('architectures')!r}"
        )
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model class {name!r}; code that comes with a "
            "checkpoint (auto_map) is not run"
        )
    try:
        config = kind.config_class.from_dict(raw)
    except Exception as error:  # validation has exceptions of its own, which are no ValueErrors
        raise ValueError(f"{path}: not a configuration of {name}: {error}") from error
    return config, kind


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it. Raises FileNotFoundError, or ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint needs its config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config
