"""The settings of HiDe, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("fused", "routed", "none")
_CHOICES = {
    "fusion": ("delta", "factors"),
    "routing": ("sample", "batch"),
    "top_role": ROLES,
    "lower_role": ROLES,
    "fused_form": ("auto", "merged", "adapter"),
    "projector": ("fused", "mean", "last", "routed", "base"),
    "missing_modality": ("drop", "rescale"),
}


@dataclass(frozen=True)
class HiDeConfig:
    """Settings of HiDe; the defaults are the paper's, computed exactly.

    Attributes:
        top_layers: how many of the last decoder layers take `top_role`, at least 0 (0: none; "merge all" of table 3).
        image_weight, text_weight: alpha and beta of equation 4, the weights of the two cosines; not negative, not
            both 0.
        temperature: T of equation 4, positive.
        fusion: "delta" adds the products ``e_c s_c B_c A_c`` (equation 6); "factors" adds the A and the B apart, as
            the authors' code does, so that cross terms ``B_i A_j`` enter.
        routing: "sample" gives each row of a batch its own weights; "batch" gives all rows those of the largest
            similarity in the batch, as the authors' code does (right for one row only).
        fusion_coefficients: e_c of equation 6: one number for all tasks, or a mapping by task (1 where it has none).
        top_role, lower_role: what becomes of the experts in the top layers and below them: "routed" (weighted for
            each sample), "fused" (added once) or "none" (left out).
        fused_form: "merged" writes fused layers into the weights, "adapter" keeps them as a LoRA beside the weights;
            "auto" merges where the weight is a plain one and keeps an adapter where it is quantised.
        projector: what acts of the tasks' projectors: "fused" adds their changes to the base's projector with the
            fusion coefficients, "mean" takes the mean of the projectors, "last" that of the task that came last (the
            authors' choice, whose projector is trained on from task to task), "routed" mixes their outputs with the
            routing weights of the sample, "base" none of them.
        missing_modality: for a prompt without images: "drop" leaves the image's term of equation 4 out, "rescale"
            gives its weight to the text.

    Raises:
        TypeError, ValueError: a value is of a wrong type or out of range.
    """

    top_layers: int = 1
    image_weight: float = 0.5
    text_weight: float = 0.5
    temperature: float = 0.1
    fusion: str = "delta"
    routing: str = "sample"
    fusion_coefficients: float | Mapping[str, float] = field(default=1.0, hash=False)
    top_role: str = "routed"
    lower_role: str = "fused"
    fused_form: str = "auto"
    projector: str = "fused"
    missing_modality: str = "drop"

    def __post_init__(self) -> None:
        if isinstance(self.top_layers, bool) or not isinstance(self.top_layers, int) or self.top_layers < 0:
            raise ValueError(f"top_layers: expected an int of at least 0, got {self.top_layers!r}")
        for name in ("image_weight", "text_weight", "temperature"):
            _check_number(name, getattr(self, name))
        total = self.image_weight + self.text_weight
        if self.image_weight < 0 or self.text_weight < 0 or total == 0 or not math.isfinite(total):
            raise ValueError(
                "image_weight, text_weight: expected two numbers of at least 0, not both 0, with a finite sum, "
                f"got {self.image_weight!r} and {self.text_weight!r}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.fusion_coefficients, Mapping):
            for task, value in self.fusion_coefficients.items():
                _check_number(f"fusion_coefficients[{task!r}]", value)
        else:
            _check_number("fusion_coefficients", self.fusion_coefficients)

    def coefficient(self, task: str) -> float:
        """The fusion coefficient e_c of a task."""
        if isinstance(self.fusion_coefficients, Mapping):
            return float(self.fusion_coefficients.get(task, 1.0))
        return float(self.fusion_coefficients)

    def role(self, layer: int, layers: int) -> str:
        """The role of decoder layer `layer` (0-based) of `layers`."""
        return self.top_role if layer >= layers - self.top_layers else self.lower_role

    def replace(self, **changes: Any) -> HiDeConfig:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        if isinstance(self.fusion_coefficients, Mapping):
            values["fusion_coefficients"] = dict(self.fusion_coefficients)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HiDeConfig:
        """The settings that `to_dict` wrote. ValueError on a name that is none of them."""
        unknown = sorted(set(values) - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"config: expected settings of HiDeConfig, got {', '.join(unknown)} too")
        return cls(**values)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
