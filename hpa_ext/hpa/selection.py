"""HPA's choice of columns: pure tensors in, tensors out, on any device and without synchronising with it.

Layers are chosen for together, those of one shape as the rows of a matrix, so that a whole model takes as many launches
as one layer. Equation numbers follow HPA (CVPR 2026), sections 3.1 (focusing-based partition) and 3.2 (balanced
selection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.hpa.config import HPAConfig, column_count


@dataclass(frozen=True)
class ColumnScores:
    """What the columns of layers of one width are chosen by.

    Attributes:
        safety, task: float ``[layers, columns]``, the mean scores of the columns, not negative.
        alpha: float64 ``[layers]``, from `balance`.
        depths: layer / number of layers of each.
    """

    safety: Tensor
    task: Tensor
    alpha: Tensor
    depths: Sequence[float]


@dataclass(frozen=True)
class Selection:
    """Which columns of a layer are retained, and why.

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
    """``alpha = (a0 + a1)/2 + (a1 - a0)/2 * tanh(mean of log_ratio over valid)``; the midpoint if nothing is valid.

    `log_ratio` and `valid` are ``[..., columns]``, alpha is ``[...]``.
    """
    zero = torch.zeros((), dtype=log_ratio.dtype, device=log_ratio.device)
    mean = torch.where(valid, log_ratio, zero).sum(-1) / valid.sum(-1).clamp(min=1)
    middle, half = (config.alpha_min + config.alpha_max) / 2, (config.alpha_max - config.alpha_min) / 2
    return middle + half * torch.tanh(mean)


def select(groups: Sequence[ColumnScores], config: HPAConfig) -> list[list[Selection]]:
    """Choose the columns to retain.

    Args:
        groups: the scores, those of one width together.
        config: settings; see `HPAConfig` for the ablations.

    Returns:
        For each group, for each of its layers a `Selection` that retains exactly
        ``column_count(config.retain_percent(depth), columns)`` columns, or none when both kinds of selection are
        switched off.
    """
    percents = [[config.retain_percent(depth) for depth in group.depths] for group in groups]
    retain, focus = (
        [
            [column_count(percent * multiple, group.safety.shape[-1]) for percent in of_group]
            for group, of_group in zip(groups, percents, strict=True)
        ]
        for multiple in (1.0, config.focus_multiple)
    )
    safety, task = [group.safety for group in groups], [group.task for group in groups]
    focused = _highest(safety + task, focus + focus)
    safety_columns, task_columns = focused[: len(groups)], focused[len(groups) :]
    balanced = [g.safety - g.alpha.to(g.safety.dtype)[:, None] * g.task for g in groups]
    if config.safety_scores and config.shared_selection:
        # First the columns that matter to safety alone, then the shared ones by their balance.
        both = list(zip(safety_columns, task_columns, strict=True))
        first = _highest(safety, retain, [s & ~t for s, t in both])
        rest = [(_constants(k, f.device) - f.sum(-1)).unbind() for k, f in zip(retain, first, strict=True)]
        shared = _highest(balanced, rest, [s & t for s, t in both])
        retained = [f | s for f, s in zip(first, shared, strict=True)]
    elif config.safety_scores:
        retained = _highest(safety, retain)
    elif config.shared_selection:
        retained = _highest(balanced, retain)
    else:
        retained = [torch.zeros_like(columns) for columns in safety_columns]
    return [
        [Selection(*rows) for rows in zip(*(part.unbind() for part in parts), of_group, strict=True)]
        for *parts, of_group in zip(
            retained, safety_columns, task_columns, [group.alpha for group in groups], percents, strict=True
        )
    ]


def _highest(
    scores: Sequence[Tensor],
    counts: Sequence[Sequence[int | Tensor]],
    eligible: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """For each of `scores` ``[layers, columns]`` the mask of each row's highest, by one operation for all."""
    rows = [row for matrix in scores for row in matrix.unbind()]
    among = None if eligible is None else [row for matrix in eligible for row in matrix.unbind()]
    masks = ops.column_mask_list(rows, [count for of_group in counts for count in of_group], among)
    sizes = [matrix.shape[0] for matrix in scores]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [torch.stack(masks[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _constants(values: Sequence[int], device: torch.device) -> Tensor:
    """``[len(values)]`` int64. Filled on the device: a copy from the host could not be captured in a CUDA graph."""
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    return torch.cat([torch.full((length,), value, dtype=torch.int64, device=device) for value, length in runs])
