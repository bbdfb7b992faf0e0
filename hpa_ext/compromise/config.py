"""The settings of the closed-form compromise, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hpa_ext.ops.inverse_diagonal import RESCUES

DEFAULT_BUDGET = 0.1
"""Share of tuning's change on the safety set that is left when neither a strength nor a budget is given."""

LARGEST = 1e30
"""Of every setting: float32 takes no more than 3.4e38, and far below that the old weight is the answer."""

DEFAULT_EARLIER_STRENGTH = 1.0
"""nu, for the Grams of earlier tasks: each of them counts as much as the new task."""


@dataclass(frozen=True)
class CompromiseConfig:
    """Settings of the compromise ``W_old + D H_t (H_t + mu H_s + nu H_e)^-1``; strength or budget is in force.

    Attributes:
        strength: mu, at least 0: what a change of the outputs on the safety set costs against one on the task set.
            0 keeps the tuned weight.
        budget: the outputs of each linear on the safety set may change by at most this share of what tuning changed,
            in mean square: ``tr(D^ H_s D^T) <= budget tr(D H_s D^T)``; in [0, 1]. The smallest strength that holds it
            is found for each linear, to within `tolerance`. 1 keeps the tuned weight, 0 the old one. With neither
            strength nor budget `DEFAULT_BUDGET` is in force.
        damping: added to each Gram, relative to the mean of its diagonal.
        safety_damping: the same for the protected Grams (safety, earlier tasks) alone; None: `damping`. With 0 and a
            large strength the update is projected onto what the safety activations do not span.
        earlier_strength: nu, at least 0: what a change of the outputs on the samples of an earlier task costs against
            one on the task set, where Grams of earlier tasks are given (``H_e`` is their sum). It is in force beside a
            budget, too, which bounds the change on the safety set alone.
        tolerance: how far below its budget a linear may end, as a share of the budget; in (0, 1).
        rescue: what may be done when float32 does not suffice: "damping" (float64, then ten times more damping at a
            time up to 1; where `safety_damping` is 0 and `damping` is not, that side's is raised first, from 1e-6 on),
            "precision" (float64 alone) or "none". What was done is in the report.
    """

    strength: float | None = None
    budget: float | None = None
    damping: float = 0.01
    safety_damping: float | None = None
    earlier_strength: float = DEFAULT_EARLIER_STRENGTH
    tolerance: float = 0.01
    rescue: str = "damping"

    method: ClassVar[str] = "compromise"

    def __post_init__(self) -> None:
        if self.strength is not None and self.budget is not None:
            raise ValueError(
                f"strength, budget: expected one of them, got strength {self.strength!r} and budget {self.budget!r}"
            )
        if self.strength is None and self.budget is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        for name in ("strength", "budget", "earlier_strength", "damping", "safety_damping", "tolerance"):
            value = getattr(self, name)
            if value is None and name in ("strength", "budget", "safety_damping"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}: expected a finite number, at least 0, got {value!r}")
            if value > LARGEST:
                raise ValueError(f"{name}: expected at most {LARGEST:g}, got {value!r}")
        if self.budget is not None and self.budget > 1:
            raise ValueError(f"budget: expected a share in [0, 1], got {self.budget!r}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a share in (0, 1), got {self.tolerance!r}")
        if self.rescue not in RESCUES:
            raise ValueError(f"rescue: expected one of {', '.join(RESCUES)}, got {self.rescue!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self)
