"""One measured point of a cost curve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """What something cost, and what the model said.

    Attributes:
        phase: which part of the benchmark it is from.
        series: what was measured, with what was held fixed.
        variable: "width", "tokens", "layers" or "rank".
        value: of the variable.
        measured, predicted: in `unit`.
        unit: "seconds" or "bytes".
    """

    phase: str
    series: str
    variable: str
    value: float
    measured: float
    predicted: float
    unit: str = "seconds"

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted

    def text(self, value: float) -> str:
        """A value in its unit, for people."""
        return f"{value * 1e3:.3g} ms" if self.unit == "seconds" else f"{value / 2**20:.3g} MiB"
