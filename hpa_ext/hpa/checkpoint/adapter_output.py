"""The output as an adapter: megabytes, and exact for a LoRA update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hpa_ext.checkpoints.harmonized_adapter import write_harmonized_adapter
from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.manifest import write_manifest
from hpa_ext.checkpoints.output import publish
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.journals import gather_journals
from hpa_ext.hpa.checkpoint.merge import Diagonals, moved, plan_module
from hpa_ext.hpa.checkpoint.pipeline import run_pipeline
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.checkpoint.records import manifest_report, report_of, report_record
from hpa_ext.hpa.low_rank import gain_of
from hpa_ext.hpa.report import LayerReport
from hpa_ext.hpa.update import WeightUpdate
from hpa_ext.processes import Processes


def write_adapter_output(
    job: Job,
    partial: Path,
    out: Path,
    identity: dict,
    diagonals: Diagonals,
    finished: Mapping[str, dict],
    journal: Journal,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> list[LayerReport]:
    """Score what is not finished, then write and publish; the reports of all modules."""
    todo = [name for name in job.names if _key(name) not in finished]
    mine = todo[processes.rank :: processes.count]
    progress.begin("score", len(mine), "layer")

    def score(module: str, update: WeightUpdate) -> LayerReport:
        progress.show(module)
        return plan_module(job, diagonals, module, moved(update, device)).report(module)

    def keep(module: str, report: LayerReport) -> None:
        journal.append(_key(module), report_record(report))
        progress.advance(1)

    processes.together(lambda: run_pipeline(mine, job.weight_update, score, keep))
    gather_journals(partial, identity, journal, processes)
    done = processes.once(lambda: dict(journal.finished))
    reports = [report_of(done[_key(name)]) for name in job.names]
    processes.once(lambda: _finish(job, partial, out, identity, reports, journal))
    return reports


def _finish(job: Job, partial: Path, out: Path, identity: dict, reports: list[LayerReport], journal: Journal) -> None:
    retained = {report.name: report.retained for report in reports}
    gain = {
        report.name: gain_of(report.retained, torch.tensor(report.projection_coefficient, dtype=torch.float32))
        for report in reports
    }
    write_harmonized_adapter(job.adapter, retained, gain, partial)
    write_manifest(partial, identity, manifest_report(reports, job.shared, job.not_covered))
    publish(partial, out, journal)


def _key(module: str) -> str:
    return f"module:{module}"
