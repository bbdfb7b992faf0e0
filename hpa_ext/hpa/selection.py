"""HPA's choice of columns: pure tensors in, tensors out, on any device and without synchronising with it.

Equation numbers follow HPA (CVPR 2026), sections 3.1 (focusing-based partition) and 3.2 (balanced selection).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.hpa.config import HPAConfig, column_count


@dataclass(frozen=True)
class Selection:
    """Which columns are retained, and why.

    Attributes:
        retained: bool ``[columns]``, to be kept from the old weight.
        safety_columns, task_columns: bool ``[columns]``, the focused sets S and T.
        alpha: scalar float64.
        retain_percent: the percentage that was asked for.
    """

    retained: Tensor
    safety_columns: Tensor
    task_columns: Tensor
    alpha: Tensor
    retain_percent: float


def balance(log_ratio: Tensor, valid: Tensor, config: HPAConfig) -> Tensor:
    """``alpha = (a0 + a1)/2 + (a1 - a0)/2 * tanh(mean of log_ratio over valid)``; the midpoint if nothing is valid."""
    total = torch.where(valid, log_ratio, torch.zeros((), dtype=log_ratio.dtype, device=log_ratio.device)).sum()
    mean = total / valid.sum().clamp(min=1)
    middle, half = (config.alpha_min + config.alpha_max) / 2, (config.alpha_max - config.alpha_min) / 2
    return middle + half * torch.tanh(mean)


def select(safety: Tensor, task: Tensor, alpha: Tensor, depth: float, config: HPAConfig) -> Selection:
    """Choose the columns to retain.

    Args:
        safety, task: float ``[columns]``, the mean scores of the columns, not negative.
        alpha: scalar, from `balance`.
        depth: layer / number of layers.
        config: settings; see `HPAConfig` for the ablations.

    Returns:
        A `Selection` that retains exactly ``column_count(config.retain_percent(depth), columns)`` columns, or none
        when both kinds of selection are switched off.
    """
    columns = safety.shape[-1]
    percent = config.retain_percent(depth)
    retain = column_count(percent, columns)
    focus = column_count(percent * config.focus_multiple, columns)
    safety_columns = ops.column_mask(safety, focus)
    task_columns = ops.column_mask(task, focus)
    balanced = (safety - alpha.to(safety.dtype) * task).contiguous()
    if config.safety_scores and config.shared_selection:
        # First the columns that matter to safety alone, then the shared ones by their balance.
        retained = ops.column_mask(safety, retain, eligible=safety_columns & ~task_columns)
        rest = retain - retained.sum(-1)
        retained = retained | ops.column_mask(balanced, rest, eligible=safety_columns & task_columns)
    elif config.safety_scores:
        retained = ops.column_mask(safety, retain)
    elif config.shared_selection:
        retained = ops.column_mask(balanced, retain)
    else:
        retained = torch.zeros_like(safety_columns)
    return Selection(retained, safety_columns, task_columns, alpha, percent)
