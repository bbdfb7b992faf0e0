"""The time of stages that run beside each other on a few cores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline, over the whole run.

    Attributes:
        seconds: of the clock, if it ran alone.
        processor_seconds: of all cores together; less than `seconds` where it waits for a disk, more where it uses
            several cores.
    """

    seconds: float
    processor_seconds: float


def pipeline_seconds(stages: Iterable[Stage], cores: int) -> float:
    """Seconds of the clock: the slowest stage, or all processor time over the cores, whichever is longer."""
    stages = list(stages)
    slowest = max((stage.seconds for stage in stages), default=0.0)
    return max(slowest, sum(stage.processor_seconds for stage in stages) / max(cores, 1))
