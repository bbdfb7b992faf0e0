"""What the compromise did, layer by layer, as values on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.factor import dampings_of
from hpa_ext.compromise.solution import Compromise, Solution
from hpa_ext.reporting.table import format_table


@dataclass(frozen=True)
class CompromiseLayerReport:
    """What the compromise did to one linear.

    Attributes:
        name: the module's name, None for a bare weight.
        strength: mu as it was used; infinite where a budget of 0 restored the old weight.
        budget: the share that was asked for, None with a strength.
        safety_left: the share of tuning's mean squared change of outputs that is left on the safety set, which a budget
            bounds; None if tuning changed none of them.
        earlier_left: the same on the earlier tasks' samples; None without any.
        task_lost: the mean squared distance to the tuned outputs on the task set, as a share of tuning's change.
        earlier_count: how many Grams of earlier tasks there were.
        dead_columns: per Gram ("safety", "task"), how many input features were zero for every token.
        damping_used: per Gram; more than asked for only after a rescue.
        precision_bits: of the factorisation, 32 or 64; 0 where none was needed.
        evaluations: how many strengths were tried; 0 where the update stayed as it was, or went.
        update_norm: Frobenius norm of what tuning added; kept_norm: of what is left of it.

    Shares are those before the result is rounded to the dtype of the weights. Both are 1 and 0 for the tuned weight.
    """

    name: str | None
    strength: float
    budget: float | None
    safety_left: float | None
    earlier_left: float | None
    task_lost: float | None
    earlier_count: int
    dead_columns: dict[str, int]
    damping_used: dict[str, float]
    precision_bits: int
    evaluations: int
    update_norm: float
    kept_norm: float

    @classmethod
    def of(
        cls,
        name: str | None,
        solution: Solution,
        compromise: Compromise,
        earlier_count: int,
    ) -> CompromiseLayerReport:
        """The report of a solution that `compromise` found."""
        factor, config = solution.factor, compromise.config
        task, safety = dampings_of(config) if factor is None else (factor.task_damping, factor.protected_damping)
        return cls(
            name=name,
            strength=solution.strength,
            budget=config.budget,
            safety_left=solution.safety_left,
            earlier_left=solution.earlier_left,
            task_lost=solution.task_lost,
            earlier_count=earlier_count,
            dead_columns=dict(compromise.grams.dead_columns),
            damping_used={"safety": safety, "task": task},
            precision_bits=0 if factor is None else factor.precision_bits,
            evaluations=solution.evaluations,
            update_norm=solution.norms[0],
            kept_norm=solution.norms[1],
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, which knows no infinity: that becomes the text "inf"."""
        values = dataclasses.asdict(self)
        return values | {"strength": self.strength if math.isfinite(self.strength) else "inf"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompromiseLayerReport:
        """The report that `to_dict` described."""
        return cls(**{**values, "strength": float(values["strength"])})


@dataclass
class CompromiseReport:
    """What the compromise did to a model or an adapter; prints as a table.

    Attributes:
        layers: a `CompromiseLayerReport` for each linear, in the order of the model.
        config: the settings.
        shared: other names of a weight that was handled under its first name.
        not_covered: what stayed as the tuning made it.
        warnings: one line for each thing a user should know.
    """

    layers: dict[str, CompromiseLayerReport]
    config: CompromiseConfig
    shared: dict[str, str] = field(default_factory=dict)
    not_covered: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> CompromiseLayerReport:
        return self.layers[name]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "method": self.config.method,
            "config": self.config.to_dict(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "shared": dict(self.shared),
            "not_covered": list(self.not_covered),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        header = ("module", "strength", "budget", "safety left", "earlier left", "task lost", "|kept|/|update|", "bits")
        rows = [
            (
                name,
                f"{layer.strength:.4g}",
                _share(layer.budget),
                _share(layer.safety_left),
                _share(layer.earlier_left),
                _share(layer.task_lost),
                f"{layer.kept_norm / layer.update_norm:.3f}" if layer.update_norm > 0 else "-",
                str(layer.precision_bits or "-"),
            )
            for name, layer in self.layers.items()
        ]
        lines = [format_table(header, rows)]
        lines += [f"shares its weight: {name} with {first}" for name, first in self.shared.items()]
        lines += [f"not covered: {name}" for name in self.not_covered]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def report_warnings(reports: Mapping[str, CompromiseLayerReport], config: CompromiseConfig) -> list[str]:
    """One line for each kind of rescue, and one if there was nothing to do."""
    asked = dict(zip(("task", "safety"), dampings_of(config), strict=True))
    events = {
        "needed more damping": [
            name for name, one in reports.items() if any(one.damping_used[kind] > asked[kind] for kind in asked)
        ],
        "was factored in float64": [name for name, one in reports.items() if one.precision_bits == 64],
    }
    lines = [
        f"the sum of the Grams {event} in {len(names)} {'layer' if len(names) == 1 else 'layers'}, such as {names[0]}"
        for event, names in events.items()
        if names
    ]
    if all(report.update_norm == 0 for report in reports.values()):
        lines.append("no weight differs between the old and the new model, so nothing was harmonized")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
