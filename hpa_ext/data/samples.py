"""The one record that tasks, safety sets, collation and evaluation pass around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One instruction with its answer.

    ``image``: uint8 array ``[height, width, 3]`` or a PIL image; None for a text-only sample.
    ``answer``: the target text; for an evaluation prompt, the reference.
    ``risk_class``: the name of the risk class of a harmful prompt; None for a harmless one.
    ``modality``: where the content that decides the answer is: "text", "image" or "both".
    """

    image: Any | None
    instruction: str
    answer: str
    risk_class: str | None = None
    modality: str = "image"

    def __post_init__(self) -> None:
        if self.modality not in ("text", "image", "both"):
            raise ValueError(f"modality: expected 'text', 'image' or 'both', got {self.modality!r}")
        if self.image is None and self.modality != "text":
            raise ValueError(f"image: a sample of modality {self.modality!r} needs an image, got None")
