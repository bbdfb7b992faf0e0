"""The safetensors file of anchors: per task and modality a mean and a count, with the tasks' order in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.hide.tensor_files import read_tensors, write_tensors

_FORMAT = "1"
_MODALITIES = ("image", "text")

# By task, then by modality: how many samples, and their mean feature.
Means = Mapping[str, Mapping[str, tuple[int, Tensor]]]


def write_means(path: str | Path, means: Means, features: Mapping[str, Any] | None) -> Path:
    """Write one file, whole or not at all; returns it."""
    tensors = {}
    for number, of_task in enumerate(means.values()):
        for modality, (count, mean) in of_task.items():
            tensors[f"{number}.{modality}.mean"] = mean
            tensors[f"{number}.{modality}.count"] = torch.tensor(count, dtype=torch.int64)
    metadata = {
        "hide_anchors": _FORMAT,
        "tasks": json.dumps(list(means)),
        "features": json.dumps(None if features is None else dict(features)),
    }
    return write_tensors(path, tensors, metadata)


def read_means(path: str | Path) -> tuple[dict[str, dict[str, tuple[int, Tensor]]], dict[str, Any] | None]:
    """Means and the description of the features that `write_means` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or broken: what `Anchors.update` would not have let in. Named.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("hide_anchors") != _FORMAT:
        raise ValueError(f"{path}: expected anchors of HiDe in format {_FORMAT}, got another safetensors file")
    tasks, features = _json(path, metadata, "tasks"), _json(path, metadata, "features")
    if not isinstance(tasks, list) or not all(isinstance(task, str) and task for task in tasks):
        raise ValueError(f"{path}: tasks: expected a list of names, got {tasks!r}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"{path}: tasks: expected each once, got {', '.join(tasks)}")
    if features is not None and not isinstance(features, dict):
        raise ValueError(f"{path}: features: expected a description, got {features!r}")
    means: dict[str, dict[str, tuple[int, Tensor]]] = {}
    widths: dict[str, int] = {}
    for number, task in enumerate(tasks):
        means[task] = {}
        for modality in _MODALITIES:
            mean, count = (tensors.pop(f"{number}.{modality}.{part}", None) for part in ("mean", "count"))
            if mean is None and count is None:
                continue
            where = f"{path}: {modality} anchor of {task!r}"
            if mean is None or mean.dim() != 1 or mean.dtype != torch.float64 or not bool(torch.isfinite(mean).all()):
                raise ValueError(f"{where}: expected a finite float64 mean [d], got {_shown(mean)}")
            if count is None or count.dim() != 0 or count.dtype != torch.int64 or int(count) < 1:
                raise ValueError(f"{where}: expected an int64 count of at least 1, got {_shown(count)}")
            if widths.setdefault(modality, len(mean)) != len(mean):
                raise ValueError(f"{where}: expected width {widths[modality]} like the ones before, got {len(mean)}")
            means[task][modality] = int(count), mean
    if tensors:
        raise ValueError(f"{path}: expected anchors of {', '.join(tasks) or 'no task'} alone, got {min(tensors)} too")
    return means, features


def _json(path: str | Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {key}: expected JSON in the metadata, got {metadata.get(key)!r}") from error


def _shown(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{tensor.dtype} {tensor.item()}" if tensor.dim() == 0 else f"{tensor.dtype} {list(tensor.shape)}"
