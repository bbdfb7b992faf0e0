"""What a harmonizing method is to a run over checkpoints: the run itself only reads, writes and keeps a journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hpa_ext.checkpoints.journal import Journal
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.update import WeightUpdate
from hpa_ext.processes import Processes

if TYPE_CHECKING:
    from hpa_ext.hpa.checkpoint.job import Job


class CheckpointMethod(Protocol):
    """A method's part of a job; reports are values of its own kind."""

    def reduce(
        self,
        job: Job,
        finished: Mapping[str, dict],
        journal: Journal,
        processes: Processes,
        device: torch.device,
        progress: Progress,
    ) -> Any:
        """What is done before the first weight, such as what HPA makes of the Grams; given to `merge`."""

    def merge(
        self, job: Job, reduced: Any, modules: Sequence[str], updates: Sequence[WeightUpdate]
    ) -> list[tuple[Tensor, Any]]:
        """For each module its harmonized weight ``[out, in]``, maybe in memory of its update, and its report."""

    def record(self, report: Any) -> dict[str, Any]:
        """A report as plain values for the journal."""

    def report_of(self, record: Mapping[str, Any]) -> Any:
        """The report that `record` described."""

    def write_beside(self, job: Job, partial: Path, reports: Sequence[Any]) -> None:
        """Write what the method puts beside the weights."""

    def manifest_report(self, job: Job, reports: Sequence[Any]) -> dict[str, Any]:
        """What the manifest says was done; its ``layers`` are what `report_of` takes."""

    def model_report(self, job: Job, reports: Sequence[Any]) -> Any:
        """What the run returns."""
