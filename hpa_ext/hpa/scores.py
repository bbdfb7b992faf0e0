"""HPA's importance scores of columns (or, with output granularity, of rows), and the ratio that alpha is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.update import WeightUpdate


def column_importance(
    update: WeightUpdate, squared_update: Tensor, safety_inverse: Tensor, task_inverse: Tensor, config: HPAConfig
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Mean safety and task scores, and ``log(safety/task)`` in float64 with where it is defined.

    Args:
        update: of the weight ``[out, in]``.
        squared_update: ``[in]``, ``sum_i D_ij^2`` as `update` gives it.
        safety_inverse, task_inverse: ``[in]``, the diagonals of the Grams' inverses.
        config: `importance` and `granularity` count.

    Returns:
        ``(safety, task)`` scores, ``log_ratio`` and ``valid``; each ``[in]``, or ``[out]`` with output granularity.

    ``safety_ij = D_ij^2 / [H_s^-1]_jj`` (HPA equation 2, read as OBS has it), averaged over the other index.
    """
    out_features, in_features = update.shape
    quotient = config.importance == "quotient"
    weights = [1 / inverse if quotient else inverse for inverse in (safety_inverse, task_inverse)]
    if config.granularity == "input":
        scores = [squared_update * weight / out_features for weight in weights]
        # The update cancels in the ratio, so it is taken from the diagonals, which keep all their digits.
        valid = (squared_update > 0) & (weights[0] > 0) & (weights[1] > 0)
        ratio = _log(weights[0], valid) - _log(weights[1], valid)
    else:
        scores = [total / in_features for total in update.row_sums(weights)]
        valid = (scores[0] > 0) & (scores[1] > 0)
        ratio = _log(scores[0], valid) - _log(scores[1], valid)
    return (scores[0].contiguous(), scores[1].contiguous()), ratio, valid


def _log(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values.double(), torch.ones((), dtype=torch.float64, device=values.device)).log()
