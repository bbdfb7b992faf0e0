"""HPA's part of a run over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.masks import LayerMasks, write_masks
from hpa_ext.hpa.checkpoint import merge
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.checkpoint.records import manifest_report, report_of, report_record
from hpa_ext.hpa.checkpoint.reduce import reduce_grams
from hpa_ext.hpa.layer_plan import reports_of
from hpa_ext.hpa.report import LayerReport, ModelReport, report_warnings
from hpa_ext.hpa.update import WeightUpdate
from hpa_ext.processes import Processes


class HPAMethod:
    """See `CheckpointMethod`: Grams are reduced to the diagonals of their inverses first."""

    def reduce(
        self,
        job: Job,
        finished: Mapping[str, dict],
        journal: Journal,
        processes: Processes,
        device: torch.device,
        progress: Progress,
    ) -> Any:
        """The diagonals by set and module."""
        return reduce_grams(job, finished, journal, processes, device, progress)

    def merge(
        self, job: Job, reduced: Any, modules: Sequence[str], updates: Sequence[WeightUpdate]
    ) -> list[tuple[Tensor, LayerReport]]:
        """Score, select and merge the modules together."""
        plans = merge.plan_modules(job, reduced, modules, updates)
        reports = reports_of(plans, modules)
        return list(zip(merge.merged_weights(plans, updates), reports, strict=True))

    def record(self, report: LayerReport) -> dict[str, Any]:
        """See `CheckpointMethod`."""
        return report_record(report)

    def report_of(self, record: Mapping[str, Any]) -> LayerReport:
        """See `CheckpointMethod`."""
        return report_of(dict(record))

    def write_beside(self, job: Job, partial: Path, reports: Sequence[LayerReport]) -> None:
        """The masks, by which `verify` knows the retained columns."""
        if reports:
            write_masks(partial, {report.name: _masks(job, report) for report in reports})

    def manifest_report(self, job: Job, reports: Sequence[LayerReport]) -> dict[str, Any]:
        """See `CheckpointMethod`."""
        return manifest_report(reports, job.shared, job.not_covered)

    def model_report(self, job: Job, reports: Sequence[LayerReport]) -> ModelReport:
        """See `CheckpointMethod`."""
        by_name = {report.name: report for report in reports}
        layers = {name: by_name[name] for name in job.names}
        return ModelReport(
            layers=layers,
            config=job.config,
            shared=job.shared,
            not_covered=job.not_covered,
            warnings=report_warnings(layers, job.config) + job.warnings,
        )


def _masks(job: Job, report: LayerReport) -> LayerMasks:
    name = f"{report.name}.weight"
    along_input = job.config.granularity == "input"
    transposed = job.linears[report.name].is_transposed
    return LayerMasks(
        report.retained,
        report.safety_columns,
        report.task_columns,
        tensor=job.new.disk_name[name],
        old_tensor=job.old.disk_name[name],
        dimension=int(along_input != transposed),
    )
