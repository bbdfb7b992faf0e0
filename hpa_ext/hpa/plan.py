"""Score, select and adjust: everything that merging a layer needs, computed without changing a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramPair
from hpa_ext.gram_diagonal import AnyGram, GramDiagonal
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.report import LayerReport
from hpa_ext.hpa.scores import column_importance
from hpa_ext.hpa.selection import Selection, balance, select
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate
from hpa_ext.ops._checks import describe


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
        """Write the harmonized weight; `out` may be `old` or `new`."""
        ops.project_merge(old, new, self.selection.retained, self.coefficient, out, axis=self.config.granularity)

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


def plan_layer(
    old: Tensor,
    new: Tensor,
    gram: GramPair | tuple[AnyGram, AnyGram],
    depth: float,
    config: HPAConfig,
    *,
    check: bool = True,
) -> LayerPlan:
    """Score and select for weights ``[out, in]``; with ``check`` False without reading anything on the host."""
    return plan_update(DenseUpdate(old, new), gram, depth, config, check=check)


def plan_update(
    update: WeightUpdate,
    gram: GramPair | tuple[AnyGram, AnyGram],
    depth: float,
    config: HPAConfig,
    *,
    check: bool = True,
) -> LayerPlan:
    """As `plan_layer`, for an update in any form."""
    config.retain_percent(depth)  # raises for a depth out of range, before any work
    safety, task = _pair(gram)
    _check_gram("gram.safety", safety, update)
    _check_gram("gram.task", task, update)
    squared_update, inner_product, old_squared_norm = update.column_sums()
    if check and not all(bool(torch.isfinite(v).all()) for v in (squared_update, inner_product, old_squared_norm)):
        update.raise_not_finite()  # the sums show it, so that no further pass over the weights is needed
    inverses = (_inverse("gram.safety", safety, config, check), _inverse("gram.task", task, config, check))
    diagonals = [inverse.diagonal.to(squared_update.dtype) for inverse in inverses]
    scores, log_ratio, valid = column_importance(update, squared_update, diagonals[0], diagonals[1], config)
    if check:
        _check_scores(diagonals, scores)
    selection = select(scores[0], scores[1], balance(log_ratio, valid, config), depth, config)
    zero = torch.zeros_like(inner_product)
    coefficient = zero
    if config.orthogonal:
        coefficient = torch.where(old_squared_norm == 0, zero, inner_product / old_squared_norm)
    if not check:
        # A Gram that failed has NaN here; it must show in the result rather than choose columns at random.
        coefficient = coefficient + 0 * (diagonals[0].sum() + diagonals[1].sum())
    backend = update.backend()
    backend["column_mask"] = ops.backend_of("column_mask", scores[0])
    backend["inverse_diagonal"] = ops.backend_of("inverse_diagonal", inverses[0].diagonal)
    if config.granularity == "output":
        backend["row_scores"] = "torch"
    return LayerPlan(
        selection=selection,
        coefficient=coefficient,
        config=config,
        depth=depth,
        squared_update=squared_update,
        old_squared_norm=old_squared_norm,
        dead_columns=(_dead_columns(safety), _dead_columns(task)),
        inverses=inverses,
        backend=backend,
    )


def _pair(gram: Any) -> tuple[AnyGram, AnyGram]:
    if not isinstance(gram, tuple) or len(gram) != 2:
        raise TypeError(f"gram: expected a GramPair or a tuple (safety, task), got {type(gram).__name__}")
    return gram


def _check_gram(name: str, gram: Any, update: WeightUpdate) -> None:
    if not isinstance(gram, (Gram, GramDiagonal, Tensor)):
        raise TypeError(f"{name}: expected a Gram or a matrix [in, in], got {describe(gram)}")
    width = tuple(gram.shape) if isinstance(gram, Tensor) else (gram.in_features, gram.in_features)
    if len(update.shape) == 2 and width != (update.shape[1], update.shape[1]):
        raise ValueError(
            f"{name}: expected [{update.shape[1]}, {update.shape[1]}] for a weight {list(update.shape)}, "
            f"got {list(width)}"
        )
    if gram.device != update.device:
        raise ValueError(f"{name}: expected device {update.device} like the weights, got {gram.device}")


def _inverse(name: str, gram: AnyGram, config: HPAConfig, check: bool) -> ops.InverseDiagonal:
    try:
        if not isinstance(gram, Tensor):
            return gram.inverse_diagonal_report(
                config.damping, normalization=config.normalization, rescue=config.rescue
            )
        return ops.inverse_diagonal(gram, config.damping, rescue=config.rescue, check=check, return_report=True)
    except NumericalError as error:
        raise NumericalError(
            f"{name}: {error.message}", failing_minor=error.failing_minor, damping=error.damping
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _dead_columns(gram: AnyGram) -> Tensor:
    return gram.diagonal() == 0 if isinstance(gram, Tensor) else gram.dead_columns()


def _check_scores(diagonals: list[Tensor], scores: tuple[Tensor, Tensor]) -> None:
    """Raise if a Gram's inverse or a score left the range of its dtype: columns would be chosen by their index."""
    for name, diagonal, score in zip(("gram.safety", "gram.task"), diagonals, scores, strict=True):
        if not bool(torch.isfinite(diagonal).all()):
            raise NumericalError(f"{name}: too small, its inverse overflows {diagonal.dtype}; scale the activations")
        if not bool(torch.isfinite(score).all()):
            raise NumericalError(f"{name}: too large for these weights, the scores overflow {score.dtype}")
