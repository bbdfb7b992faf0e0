"""What the actions of ``hpa-ext hide`` take in: models, anchors, settings, pairs of task and path."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hpa_ext.calibrating import load_processor
from hpa_ext.hide import Anchors, HiDeConfig, HiDeModel
from hpa_ext.hide.anchor_collection import collect_anchors
from hpa_ext.hide.checks import check_coefficients
from hpa_ext.hide.loading import data_batches, features_of, load_base
from hpa_ext.hide.persistence import load, read_settings
from hpa_ext.training.hide_expert import ANCHORS_FILE


def load_model(args: argparse.Namespace) -> tuple[HiDeModel, Any, Any]:
    """A saved HiDe model on its base, with processor and weights."""
    _quiet()
    settings = read_settings(args.model)
    base, weights = load_base(args.base, args.device, getattr(torch, args.dtype) if args.dtype else None)
    processor = load_processor(args.base)
    features = features_of(settings["features"], base, processor, args.clip)
    return load(args.model, base, features=features, base_weights=weights.tensor), processor, weights


def gather_anchors(
    args: argparse.Namespace, tasks: list[str], adapters: dict[str, str], description: dict[str, Any] | None = None
) -> Anchors | None:
    """Anchors from data, from a file, or from the adapters' directories; None if there are none anywhere."""
    if args.data and args.anchors is not None:
        raise ValueError("--anchors, --data: expected one of them, got both")
    if args.anchors is not None:
        return Anchors.load(args.anchors).select(tasks)
    if not args.data:
        files = {task: Path(source) / ANCHORS_FILE for task, source in adapters.items()}
        found = [task for task, file in files.items() if file.is_file()]
        if not found:
            return None
        missing = [task for task in tasks if task not in found]
        if missing:
            raise ValueError(f"anchors: expected {files[missing[0]]}, or --data {missing[0]}=FILE, got neither")
        return _joined([_anchors_beside(files[task], task) for task in tasks])
    data = named("--data", args.data)
    absent = [task for task in tasks if task not in data]
    if absent:
        raise ValueError(f"--data: expected a file for every task, got none for {absent[0]!r}")
    _quiet()
    base, weights = load_base(args.base, args.device, getattr(torch, args.dtype) if args.dtype else None)
    processor = load_processor(args.base)
    features = features_of(
        description, base, processor, args.clip, image=args.image_feature,
        projected_text=args.text_feature == "projected", part=args.prompt_part,
    )  # fmt: skip
    anchors = Anchors(features.describe())
    for task in tasks:
        batches = data_batches(data[task], processor, base.dtype, args.images, args.samples, args.batch_size)
        collect_anchors(base, task, batches, features, anchors)
    weights.close()
    return anchors


def _anchors_beside(file: Path, task: str) -> Anchors:
    anchors = Anchors.load(file)
    if task not in anchors:
        raise ValueError(
            f"{file}: expected anchors of {task!r}, got {', '.join(anchors.tasks) or 'none'}; call the task so, or "
            f"gather them with --data {task}=FILE"
        )
    return anchors.select([task])


def _joined(parts: list[Anchors]) -> Anchors:
    together = Anchors(parts[0].features)
    for part in parts:
        together.merge_(part)
    return together


def config_of(args: argparse.Namespace, tasks: list[str]) -> HiDeConfig:
    """The settings that were given."""
    coefficients: float | dict[str, float] = 1.0
    for entry in args.coefficients:
        task, _, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--coefficient: expected a number or TASK=NUMBER, got {entry!r}") from None
        if not task:
            coefficients = value if isinstance(coefficients, float) else dict.fromkeys(tasks, value) | coefficients
        else:
            coefficients = dict.fromkeys(tasks, coefficients) if isinstance(coefficients, float) else coefficients
            coefficients[task] = value
    config = HiDeConfig(
        args.top_layers, args.image_weight, args.text_weight, args.temperature, args.fusion, args.routing,
        coefficients, args.top_role, args.lower_role, projector=args.projector,
    )  # fmt: skip
    check_coefficients(config, tasks)
    return config


def named(flag: str, entries: list[str]) -> dict[str, str]:
    """``TASK=VALUE`` by task."""
    found: dict[str, str] = {}
    for entry in entries:
        task, sign, value = entry.partition("=")
        if not (task and sign and value):
            raise ValueError(f"{flag}: expected TASK=PATH, got {entry!r}")
        if task in found:
            raise ValueError(f"{flag}: expected each task once, got {task!r} twice")
        found[task] = value
    return found


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floating-point inputs in the model's dtype."""
    return value.to(dtype) if value.is_floating_point() else value


def open_image(path: Path) -> Any:
    """A picture from a file, in RGB. OSError if it is none."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
