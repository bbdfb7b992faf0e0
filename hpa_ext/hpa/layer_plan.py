"""What was decided about a layer: all that merging it, and telling about it, needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.report import LayerReport
from hpa_ext.hpa.selection import Selection
from hpa_ext.hpa.sharded import merge_weights
from hpa_ext.hpa.update import WeightUpdate


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

    def numbers(self) -> Tensor:
        """What the report says in numbers, float64 on the plan's device, in the order of `_NUMBERS`."""
        chosen, inverses = self.selection, self.inverses
        values = (
            chosen.alpha,
            self.coefficient,
            (chosen.safety_columns & chosen.task_columns).sum(),
            *(dead.sum() for dead in self.dead_columns),
            *(inverse.damping_used for inverse in inverses),
            *(inverse.precision_bits for inverse in inverses),
            self.squared_update.double().sum().sqrt(),
            self.old_squared_norm.double().sqrt(),
        )
        return torch.stack([value.to(chosen.alpha.device, torch.float64) for value in values])

    def masks(self) -> Tensor:
        """Bool ``[3, columns]``: retained, safety and task columns."""
        return torch.stack([self.selection.retained, self.selection.safety_columns, self.selection.task_columns])

    def report(self, name: str | None = None) -> LayerReport:
        """The plan on the host. Synchronises with a device."""
        return reports_of([self], [name])[0]


_SETS = ("safety", "task")
_NUMBERS = (
    "alpha",
    "projection_coefficient",
    "shared_count",
    *(f"{fact} {name}" for fact in ("dead_columns", "damping_used", "precision_bits") for name in _SETS),
    "update_norm",
    "old_norm",
)


def reports_of(plans: Sequence[LayerPlan], names: Sequence[str | None]) -> list[LayerReport]:
    """The plans on the host, brought there together: a device is waited for once or twice, however many there are."""
    if not plans:
        return []
    numbers = torch.stack([plan.numbers() for plan in plans]).tolist()
    masks = [plan.masks() for plan in plans]
    on_host = torch.cat([mask.flatten() for mask in masks]).cpu().split([mask.numel() for mask in masks])
    reports = []
    for plan, name, values, flat in zip(plans, names, numbers, on_host, strict=True):
        found = dict(zip(_NUMBERS, values, strict=True))
        retained, safety_columns, task_columns = flat.view(3, -1).clone().unbind()
        reports.append(
            LayerReport(
                name=name,
                depth=float(plan.depth),
                retain_percent=plan.selection.retain_percent,
                alpha=found["alpha"],
                projection_coefficient=found["projection_coefficient"],
                retained=retained,
                safety_columns=safety_columns,
                task_columns=task_columns,
                shared_count=int(found["shared_count"]),
                dead_columns={key: int(found[f"dead_columns {key}"]) for key in _SETS},
                damping_used={key: found[f"damping_used {key}"] for key in _SETS},
                precision_bits={key: int(found[f"precision_bits {key}"]) for key in _SETS},
                update_norm=found["update_norm"],
                old_norm=found["old_norm"],
                backend=plan.backend,
            )
        )
    return reports


def merge_layers(
    plans: Sequence[LayerPlan], olds: Sequence[Tensor], news: Sequence[Tensor], outs: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The harmonized weights, written to `outs`, which may be the old or the new ones.

    Of DTensors, each process writes its own part.
    """
    if not plans:
        return []
    retained, coefficients = zip(*((plan.selection.retained, plan.coefficient) for plan in plans), strict=True)
    return merge_weights(olds, news, retained, coefficients, outs, axis=plans[0].config.granularity)


def merge_updates(plans: Sequence[LayerPlan], updates: Sequence[WeightUpdate], outs: Sequence[Tensor]) -> None:
    """As `merge_layers`, for updates in any form."""
    dense = []
    for plan, update, out in zip(plans, updates, outs, strict=True):
        if isinstance(update, LowRankUpdate):
            update.merge(plan.selection, plan.coefficient, plan.config.granularity, out=out)
        else:
            dense.append((plan, update.old, update.new, out))
    if dense:
        merge_layers(*zip(*dense, strict=True))
