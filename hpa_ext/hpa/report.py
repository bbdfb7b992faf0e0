"""What harmonizing did, layer by layer, as values on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hpa_ext.hpa.config import HPAConfig
from hpa_ext.reporting.table import format_table


@dataclass(frozen=True)
class LayerReport:
    """What harmonizing did to one layer.

    Attributes:
        name: the module's name, None for a bare weight.
        depth: layer / number of layers.
        retain_percent: percent of columns retained from the old weight.
        alpha: weight of the task score on shared columns.
        projection_coefficient: ``<W_new - W_old, W_old> / ||W_old||^2``, the share of the old weight that was removed
            from the update; 0 when the adjustment is switched off or the old weight is zero.
        retained, safety_columns, task_columns: bool ``[columns]`` on the CPU.
        shared_count: columns in both focused sets.
        dead_columns: per Gram ("safety", "task"), how many input features were zero for every token.
        damping_used, precision_bits: per Gram, what its factorisation took.
        update_norm, old_norm: Frobenius norms of ``W_new - W_old`` and ``W_old``.
        backend: per operation, "native" or "torch".
    """

    name: str | None
    depth: float
    retain_percent: float
    alpha: float
    projection_coefficient: float
    retained: Tensor
    safety_columns: Tensor
    task_columns: Tensor
    shared_count: int
    dead_columns: dict[str, int]
    damping_used: dict[str, float]
    precision_bits: dict[str, int]
    update_norm: float
    old_norm: float
    backend: dict[str, str]

    @property
    def retained_count(self) -> int:
        """How many columns were retained."""
        return int(self.retained.sum())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; masks become lists of column indices."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        for key in ("retained", "safety_columns", "task_columns"):
            values[key] = values[key].nonzero().flatten().tolist()
        values["columns"] = len(self.retained)
        return values


@dataclass
class ModelReport:
    """What harmonizing did to a model; prints as a table.

    Attributes:
        layers: a `LayerReport` for each weight that was harmonized, in the model's order.
        config: the settings.
        shared: other names of a weight that was handled under its first name.
        not_covered: parameters of the decoder that hold weights of linears but are no linear modules (such as the 3-D
            experts of a mixture), and so were left as the tuning made them.
        warnings: one line for each thing a user should know (a rescue, a dead Gram).
    """

    layers: dict[str, LayerReport]
    config: HPAConfig
    shared: dict[str, str] = field(default_factory=dict)
    not_covered: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        return self.layers[name]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "config": self.config.to_dict(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "shared": dict(self.shared),
            "not_covered": list(self.not_covered),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        header = ("module", "depth", "retained", "safety", "task", "shared", "alpha", "coefficient", "|update|/|old|")
        rows = [
            (
                name,
                f"{layer.depth:.3f}",
                f"{layer.retained_count}/{len(layer.retained)}",
                str(int(layer.safety_columns.sum())),
                str(int(layer.task_columns.sum())),
                str(layer.shared_count),
                f"{layer.alpha:.3f}",
                f"{layer.projection_coefficient:+.2e}",
                f"{layer.update_norm / layer.old_norm:.3f}" if layer.old_norm > 0 else "-",
            )
            for name, layer in self.layers.items()
        ]
        lines = [format_table(header, rows)]
        lines += [f"shares its weight: {name} with {first}" for name, first in self.shared.items()]
        lines += [f"not covered: {name}" for name in self.not_covered]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def report_warnings(reports: Mapping[str, LayerReport], config: HPAConfig) -> list[str]:
    """One line for each kind of rescue that a Gram needed, and one if there was nothing to harmonize."""
    lines = []
    for kind in ("safety", "task"):
        events = {
            "needed more damping": [n for n, report in reports.items() if report.damping_used[kind] > config.damping],
            "was factored in float64": [n for n, report in reports.items() if report.precision_bits[kind] == 64],
        }
        lines += [
            f"{kind} Gram {event} in {len(names)} {'layer' if len(names) == 1 else 'layers'}, such as {names[0]}"
            for event, names in events.items()
            if names
        ]
    if all(report.update_norm == 0 for report in reports.values()):
        lines.append("no weight differs between the old and the new model, so nothing was harmonized")
    return lines
