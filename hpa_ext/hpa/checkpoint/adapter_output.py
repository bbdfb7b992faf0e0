"""The output as an adapter: megabytes, and exact for a LoRA update."""

from __future__ import annotations

import torch

from hpa_ext.checkpoints.harmonized_adapter import write_harmonized_adapter
from hpa_ext.checkpoints.manifest import write_manifest
from hpa_ext.checkpoints.output import publish
from hpa_ext.hpa.checkpoint.journals import gather_journals
from hpa_ext.hpa.checkpoint.merge import moved, plan_modules
from hpa_ext.hpa.checkpoint.pipeline import run_pipeline
from hpa_ext.hpa.checkpoint.records import manifest_report, report_of, report_record
from hpa_ext.hpa.checkpoint.work import Work
from hpa_ext.hpa.low_rank import gain_of
from hpa_ext.hpa.report import LayerReport
from hpa_ext.hpa.update import WeightUpdate


def write_adapter_output(work: Work) -> list[LayerReport]:
    """Score what is not finished, then write and publish; the reports of all modules."""
    job, journal, processes, progress = work.job, work.journal, work.processes, work.progress
    todo = [name for name in job.names if _key(name) not in work.finished]
    mine = todo[processes.rank :: processes.count]
    progress.begin("score", len(mine), "layer")

    def score(module: str, update: WeightUpdate) -> LayerReport:
        progress.show(module)
        return plan_modules(job, work.reduced, [module], [moved(update, work.device)])[0].report(module)

    def keep(module: str, report: LayerReport) -> None:
        journal.append(_key(module), report_record(report))
        progress.advance(1)

    processes.together(lambda: run_pipeline(mine, job.weight_update, score, keep))
    gather_journals(work.partial, work.identity, journal, processes)
    done = processes.once(lambda: dict(journal.finished))
    reports = [report_of(done[_key(name)]) for name in job.names]
    processes.once(lambda: _finish(work, reports))
    return reports


def _finish(work: Work, reports: list[LayerReport]) -> None:
    retained = {report.name: report.retained for report in reports}
    gain = {
        report.name: gain_of(report.retained, torch.tensor(report.projection_coefficient, dtype=torch.float32))
        for report in reports
    }
    write_harmonized_adapter(work.job.adapter, retained, gain, work.partial)
    write_manifest(work.partial, work.identity, manifest_report(reports, work.job.shared, work.job.not_covered))
    publish(work.partial, work.out, work.journal)


def _key(module: str) -> str:
    return f"module:{module}"
