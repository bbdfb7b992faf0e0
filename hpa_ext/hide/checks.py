"""Whether adapters, anchors, settings, features and model fit, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.assembly import assign
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.experts import Expert
from hpa_ext.hide.features import Features
from hpa_ext.hide.structure import layer_count


def check_parts(
    base: nn.Module, linears: Sequence[str], experts: Sequence[Expert], anchors: Anchors | None, config: HiDeConfig
) -> None:
    """ValueError if there are more top layers than layers, or anchors and experts are not of the same tasks."""
    check_top_layers(base, config)
    tasks = [expert.task for expert in experts]
    routes = any(found.kind == "routed" for found in assign(base, linears, experts, config).values())
    routes = routes or (config.projector == "routed" and any(expert.projector for expert in experts))
    if anchors is None:
        if routes:
            raise ValueError("anchors: expected those of every task, because experts are routed, got None")
        return
    for task in tasks:
        if task not in anchors:
            raise ValueError(f"anchors: expected those of task {task!r}, got {', '.join(anchors.tasks) or 'none'}")
    extra = sorted(set(anchors.tasks) - set(tasks))
    if extra:
        raise ValueError(f"adapters: expected one for every task of the anchors, got none for {extra[0]!r}")


def check_top_layers(base: nn.Module, config: HiDeConfig) -> None:
    """ValueError if there are more top layers than layers."""
    layers = layer_count(base)
    if config.top_layers > layers:
        raise ValueError(f"top_layers: expected at most the model's {layers} decoder layers, got {config.top_layers}")


def check_config(config: object) -> None:
    """TypeError if this is no `HiDeConfig`."""
    if not isinstance(config, HiDeConfig):
        raise TypeError(f"config: expected a HiDeConfig, got {type(config).__name__}")


def check_weights(weights: object, tasks: int) -> None:
    """TypeError or ValueError if these are no finite routing weights ``[b, tasks]``."""
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"weights: expected a Tensor [b, {tasks}] or a task's name, got {type(weights).__name__}")
    if weights.dim() != 2 or weights.shape[1] != tasks or not weights.is_floating_point():
        raise ValueError(f"weights: expected float [b, {tasks}], got {weights.dtype} {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("weights: expected finite numbers, got NaN or Inf")


def check_features(anchors: Anchors | None, features: Features) -> None:
    """ValueError if the anchors say that they are of other features."""
    if anchors is None or anchors.features is None:
        return
    mine, theirs = features.describe(), dict(anchors.features)
    if mine != theirs:
        raise ValueError(f"anchors: expected features {mine}, as the model is routed by, got {theirs}")


def check_coefficients(config: HiDeConfig, tasks: Sequence[str]) -> None:
    """ValueError if a fusion coefficient names a task that is not there."""
    if isinstance(config.fusion_coefficients, Mapping):
        unknown = sorted(set(config.fusion_coefficients) - set(tasks))
        if unknown:
            raise ValueError(f"fusion_coefficients: expected tasks of {', '.join(tasks)}, got {unknown[0]!r}")
