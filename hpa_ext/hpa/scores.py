"""HPA's importance scores of columns (or, with output granularity, of rows), and the ratio that alpha is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.hpa.config import HPAConfig

_ROWS_AT_A_TIME = 1024


def column_importance(
    old: Tensor, new: Tensor, squared_update: Tensor, safety_inverse: Tensor, task_inverse: Tensor, config: HPAConfig
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Mean safety and task scores, and ``log(safety/task)`` in float64 with where it is defined.

    Args:
        old, new: weights ``[out, in]``.
        squared_update: ``[in]``, ``sum_i (new - old)_ij^2``.
        safety_inverse, task_inverse: ``[in]``, the diagonals of the Grams' inverses.
        config: `importance` and `granularity` count.

    Returns:
        ``(safety, task)`` scores, ``log_ratio`` and ``valid``; each ``[in]``, or ``[out]`` with output granularity.

    ``safety_ij = D_ij^2 / [H_s^-1]_jj`` (HPA equation 2, read as OBS has it), averaged over the other index.
    """
    quotient = config.importance == "quotient"
    weights = [1 / inverse if quotient else inverse for inverse in (safety_inverse, task_inverse)]
    if config.granularity == "input":
        scores = [squared_update * weight / old.shape[0] for weight in weights]
        # The update cancels in the ratio, so it is taken from the diagonals, which keep all their digits.
        valid = (squared_update > 0) & (weights[0] > 0) & (weights[1] > 0)
        ratio = _log(weights[0], valid) - _log(weights[1], valid)
    else:
        scores = [total / old.shape[1] for total in _row_sums(old, new, weights)]
        valid = (scores[0] > 0) & (scores[1] > 0)
        ratio = _log(scores[0], valid) - _log(scores[1], valid)
    return (scores[0].contiguous(), scores[1].contiguous()), ratio, valid


def _log(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values.double(), torch.ones((), dtype=torch.float64, device=values.device)).log()


def _row_sums(old: Tensor, new: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """``sum_j (new - old)_ij^2 w_j`` for each w, some rows at a time so that no copy of the weight is made."""
    parts: list[list[Tensor]] = [[] for _ in weights]
    for start in range(0, old.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        update = new[rows].to(weights[0].dtype) - old[rows].to(weights[0].dtype)
        squares = update.square_()
        for part, weight in zip(parts, weights, strict=True):
            part.append((squares * weight).sum(1))
    return [torch.cat(part) if part else weights[0].new_zeros(0) for part in parts]
