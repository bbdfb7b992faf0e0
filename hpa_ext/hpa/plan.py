"""Score, select and adjust: everything that merging a layer needs, computed without changing a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.agreement import Agreement
from hpa_ext.errors import NumericalError
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.decisions import grams_agree, plans_of_first
from hpa_ext.hpa.layer_grams import LayerGrams, read_grams
from hpa_ext.hpa.report import LayerReport
from hpa_ext.hpa.scores import column_importance, importance_weights
from hpa_ext.hpa.selection import Selection, balance, select
from hpa_ext.hpa.sharded import merge_weights, update_of
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate
from hpa_ext.models.sharding import is_sharded
from hpa_ext.ops._checks import check_weight_pair


@dataclass(frozen=True)
class LayerPlan:
    """Everything that merging a layer needs, on its device, computed without changing a weight."""

    selection: Selection
    coefficient: Tensor
    config: HPAConfig
    depth: float
    squared_update: Tensor
    old_squared_norm: Tensor
    dead_columns: tuple[Tensor, Tensor]
    inverses: tuple[ops.InverseDiagonal, ops.InverseDiagonal]
    backend: dict[str, str]

    def merge(self, old: Tensor, new: Tensor, out: Tensor) -> None:
        """Write the harmonized weight; `out` may be `old` or `new`. Of DTensors, each process writes its own part."""
        merge_weights(old, new, self.selection.retained, self.coefficient, out, axis=self.config.granularity)

    def report(self, name: str | None = None) -> LayerReport:
        """The plan on the host. Synchronises with a device."""
        chosen = self.selection
        names = ("safety", "task")
        return LayerReport(
            name=name,
            depth=float(self.depth),
            retain_percent=chosen.retain_percent,
            alpha=float(chosen.alpha),
            projection_coefficient=float(self.coefficient),
            retained=chosen.retained.cpu(),
            safety_columns=chosen.safety_columns.cpu(),
            task_columns=chosen.task_columns.cpu(),
            shared_count=int((chosen.safety_columns & chosen.task_columns).sum()),
            dead_columns={key: int(dead.sum()) for key, dead in zip(names, self.dead_columns, strict=True)},
            damping_used={key: float(used.damping_used) for key, used in zip(names, self.inverses, strict=True)},
            precision_bits={key: int(used.precision_bits) for key, used in zip(names, self.inverses, strict=True)},
            update_norm=float(self.squared_update.double().sum().sqrt()),
            old_norm=float(self.old_squared_norm.double().sqrt()),
            backend=self.backend,
        )


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


def plan_layer(
    old: Tensor,
    new: Tensor,
    gram: GramPair | tuple[AnyGram, AnyGram],
    depth: float,
    config: HPAConfig,
    *,
    check: bool = True,
) -> LayerPlan:
    """Score and select for weights ``[out, in]``; with `check` False without reading anything on the host.

    DTensors are scored by all processes of their mesh together: if one of them raises, all do, and all get one plan.
    """
    if not is_sharded(old) and not is_sharded(new):
        check_weight_pair(old, new)
        return plan_update(DenseUpdate(old, new), gram, depth, config, check=check)
    processes = Agreement.of_tensor(new if is_sharded(new) else old)
    with processes.together():
        update = update_of(old, new)
        config.retain_percent(depth)
        grams = read_grams(gram, update.shape, update.device, config)
    grams_agree(processes, {None: grams}, config)
    sums = measure(update, grams, config)
    with processes.together():
        plan = plan_measured(sums, grams, depth, config)
    return plans_of_first(processes, {None: plan})[None]


def plan_update(
    update: WeightUpdate,
    gram: GramPair | tuple[AnyGram, AnyGram],
    depth: float,
    config: HPAConfig,
    *,
    check: bool = True,
) -> LayerPlan:
    """As `plan_layer`, for an update in any form on one process."""
    config.retain_percent(depth)  # raises for a depth out of range, before any work
    grams = read_grams(gram, update.shape, update.device, config, check=check)
    return plan_measured(measure(update, grams, config, check=check), grams, depth, config, check=check)


def measure(update: WeightUpdate, grams: LayerGrams, config: HPAConfig, *, check: bool = True) -> UpdateSums:
    """The sums over a layer's weights; of sharded weights, the only step that exchanges anything."""
    squared_update, inner_product, old_squared_norm = update.column_sums()
    rows = None
    if config.granularity == "output":
        rows = update.row_sums(importance_weights(grams.diagonals(squared_update.dtype), config))
    failure = None
    if check and not all(bool(torch.isfinite(v).all()) for v in (squared_update, inner_product, old_squared_norm)):
        try:
            update.raise_not_finite()  # the sums show it, so that no further pass over the weights is needed
        except NumericalError as error:
            failure = error
    return UpdateSums(update.shape, squared_update, inner_product, old_squared_norm, rows, update.backend(), failure)


def plan_measured(
    sums: UpdateSums, grams: LayerGrams, depth: float, config: HPAConfig, *, check: bool = True
) -> LayerPlan:
    """Score and select from the sums; NumericalError for weights or scores that are not finite."""
    if sums.failure is not None:
        raise sums.failure
    diagonals = grams.diagonals(sums.squared_update.dtype)
    scores, log_ratio, valid = column_importance(
        sums.shape, sums.squared_update, sums.row_scores, importance_weights(diagonals, config)
    )
    if check:
        _check_scores(diagonals, scores)
    selection = select(scores[0], scores[1], balance(log_ratio, valid, config), depth, config)
    zero = torch.zeros_like(sums.inner_product)
    coefficient = zero
    if config.orthogonal:
        coefficient = torch.where(sums.old_squared_norm == 0, zero, sums.inner_product / sums.old_squared_norm)
    if not check:
        # A Gram that failed has NaN here; it must show in the result rather than choose columns at random.
        coefficient = coefficient + 0 * (diagonals[0].sum() + diagonals[1].sum())
    backend = dict(sums.backend)
    backend["column_mask"] = ops.backend_of("column_mask", scores[0])
    backend["inverse_diagonal"] = ops.backend_of("inverse_diagonal", grams.inverses[0].diagonal)
    if config.granularity == "output":
        backend["row_scores"] = "torch"
    return LayerPlan(
        selection=selection,
        coefficient=coefficient,
        config=config,
        depth=depth,
        squared_update=sums.squared_update,
        old_squared_norm=sums.old_squared_norm,
        dead_columns=grams.dead_columns,
        inverses=grams.inverses,
        backend=backend,
    )


def _check_scores(diagonals: list[Tensor], scores: tuple[Tensor, Tensor]) -> None:
    """Raise if a Gram's inverse or a score left the range of its dtype: columns would be chosen by their index."""
    for name, diagonal, score in zip(("gram.safety", "gram.task"), diagonals, scores, strict=True):
        if not bool(torch.isfinite(diagonal).all()):
            raise NumericalError(f"{name}: too small, its inverse overflows {diagonal.dtype}; scale the activations")
        if not bool(torch.isfinite(score).all()):
            raise NumericalError(f"{name}: too large for these weights, the scores overflow {score.dtype}")
