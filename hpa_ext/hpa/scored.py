"""The scores of layers of one shape, computed together: matrices with a row for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.layer_grams import LayerGrams
from hpa_ext.hpa.scores import column_importance, importance_weights
from hpa_ext.hpa.selection import balance
from hpa_ext.hpa.sums import UpdateSums


@dataclass(frozen=True)
class ScoredLayers:
    """What the columns of layers of one shape are chosen and adjusted by.

    Attributes:
        inner_products, old_squared_norms: ``[layers]``, see `WeightUpdate.column_sums`.
        diagonals: of the safety and the task Grams' inverses, ``[layers, in]``.
        scores: safety and task, ``[layers, in]``, or ``[layers, out]`` with output granularity.
        alpha: float64 ``[layers]``.
    """

    inner_products: Tensor
    old_squared_norms: Tensor
    diagonals: list[Tensor]
    scores: tuple[Tensor, Tensor]
    alpha: Tensor

    @classmethod
    def of(cls, sums: Sequence[UpdateSums], grams: Sequence[LayerGrams], config: HPAConfig) -> ScoredLayers:
        squared_update = torch.stack([s.squared_update for s in sums])
        diagonals = [
            torch.stack(of_set)
            for of_set in zip(*(layer.diagonals(squared_update.dtype) for layer in grams), strict=True)
        ]
        rows = None
        if config.granularity == "output":
            rows = [torch.stack(of_set) for of_set in zip(*(s.row_scores for s in sums), strict=True)]
        scores, log_ratio, valid = column_importance(
            sums[0].shape, squared_update, rows, importance_weights(diagonals, config)
        )
        return cls(
            torch.stack([s.inner_product for s in sums]),
            torch.stack([s.old_squared_norm for s in sums]),
            diagonals,
            scores,
            balance(log_ratio, valid, config),
        )

    def failures(self) -> dict[int, NumericalError]:
        """By row, what left the range of its dtype, so that columns would be chosen by their index. Synchronises."""
        tensors = [*self.diagonals, *self.scores]
        dtype = tensors[0].dtype
        finite = torch.stack([tensor.isfinite().all(-1) for tensor in tensors], dim=-1).tolist()
        texts = (
            f"gram.safety: too small, its inverse overflows {dtype}; scale the activations",
            f"gram.task: too small, its inverse overflows {dtype}; scale the activations",
            f"gram.safety: too large for these weights, the scores overflow {dtype}",
            f"gram.task: too large for these weights, the scores overflow {dtype}",
        )
        return {
            row: NumericalError(texts[of_layer.index(False)])
            for row, of_layer in enumerate(finite)
            if not all(of_layer)
        }

    def coefficients(self, config: HPAConfig, *, check: bool) -> Tensor:
        """``<D, W_old> / ||W_old||^2`` of each layer, 0 where that is not defined or not wanted."""
        zero = torch.zeros_like(self.inner_products)
        found = zero
        if config.orthogonal:
            found = torch.where(self.old_squared_norms == 0, zero, self.inner_products / self.old_squared_norms)
        if not check:
            # A Gram that failed has NaN here; it must show in the result rather than choose columns at random.
            found = found + 0 * (self.diagonals[0].sum(-1) + self.diagonals[1].sum(-1))
        return found
