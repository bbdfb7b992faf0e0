"""HPA's importance scores of columns (or, with output granularity, of rows), and the ratio that alpha is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.hpa.config import HPAConfig


def importance_weights(inverse_diagonals: list[Tensor], config: HPAConfig) -> list[Tensor]:
    """What ``D_ij^2`` is multiplied with, ``[in]`` for each Gram: ``1 / [H^-1]_jj``, or ``[H^-1]_jj``."""
    return [1 / inverse if config.importance == "quotient" else inverse for inverse in inverse_diagonals]


def column_importance(
    shape: tuple[int, int], squared_update: Tensor, row_scores: list[Tensor] | None, weights: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Mean safety and task scores, and ``log(safety/task)`` in float64 with where it is defined.

    Args:
        shape: ``(out, in)`` of the weight.
        squared_update: ``[in]``, ``sum_i D_ij^2``.
        row_scores: for output granularity ``sum_j D_ij^2 w_j`` ``[out]`` with each of `weights`; None for input.
        weights: ``[in]`` for the safety and the task Gram, from `importance_weights`.

    Returns:
        ``(safety, task)`` scores, ``log_ratio`` and ``valid``; each ``[in]``, or ``[out]`` with output granularity.

    ``safety_ij = D_ij^2 / [H_s^-1]_jj`` (HPA equation 2, read as OBS has it), averaged over the other index.
    """
    out_features, in_features = shape
    if row_scores is None:
        scores = [squared_update * weight / max(out_features, 1) for weight in weights]
        # The update cancels in the ratio, so it is taken from the diagonals, which keep all their digits.
        valid = (squared_update > 0) & (weights[0] > 0) & (weights[1] > 0)
        ratio = _log(weights[0], valid) - _log(weights[1], valid)
    else:
        scores = [total / max(in_features, 1) for total in row_scores]
        valid = (scores[0] > 0) & (scores[1] > 0)
        ratio = _log(scores[0], valid) - _log(scores[1], valid)
    return (scores[0].contiguous(), scores[1].contiguous()), ratio, valid


def _log(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values.double(), torch.ones((), dtype=torch.float64, device=values.device)).log()
