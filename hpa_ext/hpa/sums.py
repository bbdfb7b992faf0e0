"""The sums over the weights of layers that a plan needs: those of all layers in one pass, where they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.groups import indices_by, served_together
from hpa_ext.hpa.layer_grams import LayerGrams
from hpa_ext.hpa.scores import importance_weights
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate


@dataclass(frozen=True)
class UpdateSums:
    """What a plan needs of a layer's weights.

    Attributes:
        shape: ``(out, in)``.
        squared_update, inner_product, old_squared_norm: see `WeightUpdate.column_sums`.
        row_scores: with output granularity, ``sum_j D_ij^2 w_j`` ``[out]`` for the safety and the task Gram.
        backend: which backend served the sums and will serve the merge.
        failure: what is wrong with the weights, to be raised where no other process is kept waiting.
    """

    shape: tuple[int, int]
    squared_update: Tensor
    inner_product: Tensor
    old_squared_norm: Tensor
    row_scores: list[Tensor] | None
    backend: dict[str, str]
    failure: NumericalError | None


def measure(
    updates: Sequence[WeightUpdate], grams: Sequence[LayerGrams], config: HPAConfig, *, check: bool = True
) -> list[UpdateSums]:
    """The sums of layers; of sharded weights, the only step that exchanges anything.

    With `check` the host learns, once for all layers, whether they are finite; without it nothing is read there.
    """
    sums = _column_sums(updates)
    rows: list[list[Tensor] | None] = [None] * len(updates)
    if config.granularity == "output":
        rows = [
            update.row_sums(importance_weights(layer.diagonals(squared_update.dtype), config))
            for update, layer, (squared_update, _, _) in zip(updates, grams, sums, strict=True)
        ]
    failures = _failures(updates, sums) if check else [None] * len(updates)
    return [
        UpdateSums(update.shape, *found, row_scores, update.backend(), failure)
        for update, found, row_scores, failure in zip(updates, sums, rows, failures, strict=True)
    ]


def _column_sums(updates: Sequence[WeightUpdate]) -> list[tuple[Tensor, Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(updates)
    dense = [index for index, update in enumerate(updates) if isinstance(update, DenseUpdate)]
    for together in served_together([updates[index].old for index in dense]):
        chosen = [dense[position] for position in together]
        squared, inner, norm = ops.column_scores_list(
            [updates[index].old for index in chosen], [updates[index].new for index in chosen]
        )
        for index, *of_layer in zip(chosen, squared, inner.unbind(), norm.unbind(), strict=True):
            found[index] = tuple(of_layer)
    return [update.column_sums() if sums is None else sums for update, sums in zip(updates, found, strict=True)]


def _failures(
    updates: Sequence[WeightUpdate], sums: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> list[NumericalError | None]:
    """What is wrong with each layer's weights: the sums show it, so that no further pass over sound ones is needed."""
    failures: list[NumericalError | None] = [None] * len(updates)
    for alike in indices_by((squared.shape, squared.dtype, squared.device) for squared, _, _ in sums):
        squared, *scalars = (torch.stack(parts) for parts in zip(*(sums[index] for index in alike), strict=True))
        finite = squared.isfinite().all(-1) & scalars[0].isfinite() & scalars[1].isfinite()
        for index, sound in zip(alike, finite.tolist(), strict=True):
            if not sound:
                try:
                    updates[index].raise_not_finite()
                except NumericalError as error:
                    failures[index] = error
    return failures
