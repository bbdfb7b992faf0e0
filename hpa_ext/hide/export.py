"""Out of a HiDe model again: one task's expert, or the fused part, as a plain PEFT adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hpa_ext.hide.assembly import Assignment
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.fusion import fuse
from hpa_ext.hide.structure import PROJECTORS
from hpa_ext.hide.tensor_files import new_directory, write_tensors, write_text

_PREFIX = "base_model.model."


def fused_expert(
    assignments: Mapping[str, Assignment], task: str = "fused", projector: Mapping[str, Tensor] | None = None
) -> Expert:
    """The fused layers as one expert, their ranks added (or one expert's rank with ``fusion="factors"``).

    Args:
        assignments: see `HiDeModel.assignments`.
        task: its name.
        projector: that belongs to it, by parameter name in the plain model; None for the base's.

    ValueError if there is no fused layer.
    """
    updates = {}
    for name, found in assignments.items():
        if found.kind == "fused":
            update = fuse(found.updates, found.coefficients, found.fusion)
            change = None if update.gain is None else (update.gain - 1).float()
            updates[name] = ExpertUpdate(update.a, update.b, 1.0, change)
    if not updates:
        raise ValueError("the model has no fused layers to export")
    return Expert(task, updates, dict(projector or {}))


def export_adapter(
    expert: Expert, directory: str | Path, base_name: str = "", dtype: torch.dtype | None = None
) -> Path:
    """Write an expert as a PEFT LoRA directory (``adapter_config.json``, ``adapter_model.safetensors``); returns it.

    Args:
        expert: its projector, if it has one, is written as ``modules_to_save``.
        directory: new or empty.
        base_name: for ``base_model_name_or_path``.
        dtype: of the tensors; None as they are.

    Raises:
        ValueError: the directory holds something, or the expert has a gain (a harmonized one), which plain PEFT would
            leave out in silence.
    """
    with_gain = [name for name, update in expert.updates.items() if update.gain_change is not None]
    if with_gain:
        raise ValueError(
            f"{with_gain[0]}: the expert of {expert.task!r} is harmonized and has a column gain, which a plain PEFT "
            "adapter cannot hold; merge it into a checkpoint instead"
        )
    tensors: dict[str, Tensor] = {}
    for name, update in expert.updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.a if dtype is None else update.a.to(dtype)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.b if dtype is None else update.b.to(dtype)
    for name, value in expert.projector.items():
        tensors[_PREFIX + name] = value if dtype is None else value.to(dtype)
    config = _config(expert, base_name)
    with new_directory(directory) as unfinished:
        write_tensors(unfinished / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_text(unfinished / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    return Path(directory)


def _config(expert: Expert, base_name: str) -> dict[str, object]:
    first = next(iter(expert.updates.values()))
    ranks = {name: update.rank for name, update in expert.updates.items() if update.rank != first.rank}
    alphas = {
        name: update.scaling * update.rank
        for name, update in expert.updates.items()
        if update.scaling * update.rank != first.scaling * first.rank
    }
    saved = sorted({part for name in expert.projector for part in name.split(".") if part in PROJECTORS})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        # As one expression, because a list of names is compared with the ends of names and may hit other modules.
        "target_modules": "|".join(re.escape(name) for name in expert.updates),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": saved or None,
    }
