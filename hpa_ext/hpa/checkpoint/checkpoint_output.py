"""The output as a whole checkpoint: the files of the input, with harmonized weights in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.manifest import write_manifest
from hpa_ext.checkpoints.masks import LayerMasks, write_masks
from hpa_ext.checkpoints.output import publish
from hpa_ext.checkpoints.room import require_room
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.side_files import copy_side_files
from hpa_ext.checkpoints.writer import PARTIAL, ShardedWriter
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.journals import gather_journals
from hpa_ext.hpa.checkpoint.keeper import Keeper
from hpa_ext.hpa.checkpoint.merge import Diagonals, MergeRun
from hpa_ext.hpa.checkpoint.pieces import Unit, cut, share
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.checkpoint.records import manifest_report, report_of
from hpa_ext.hpa.report import LayerReport
from hpa_ext.processes import Processes

# Masks, manifest, configuration and tokenizer beside the weights.
ROOM_BESIDE = 64 << 20


def check_room(job: Job, partial: Path) -> None:
    """Refuse a disk that is too small, before the Grams are factored; files that an earlier run began have their room.

    Raises:
        OSError: ``ENOSPC``, with what is needed and what is free.
    """
    plans = [ShardPlan.of_shard(shard) for shard in job.source.shards]
    if not _begun(partial, plans):
        require_room(partial.parent, sum(plan.size for plan in plans) + ROOM_BESIDE, f"{len(plans)} files")


def write_checkpoint_output(
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
    """Write what is not finished, then publish; the reports of all modules."""
    plans = [ShardPlan.of_shard(shard) for shard in job.source.shards]
    units = cut(job.source, job.kind_of())
    with ShardedWriter(partial, plans, job.source.index()) as writer:
        created = processes.once(lambda: _create(writer, partial, finished, units))
        if not (created and processes.is_first):
            writer.open()
        run = processes.together(
            lambda: _work(job, units, diagonals, finished, journal, processes, device, progress, writer)
        )
        gather_journals(partial, identity, journal, processes)
        done = processes.once(lambda: dict(journal.finished))
        reports = [report_of(record) for unit in units for record in done[unit.key]["layers"]]
        processes.once(lambda: _finish(job, writer, units, run, partial, out, identity, reports, journal, progress))
    return reports


def _create(writer: ShardedWriter, partial: Path, finished: Mapping[str, dict], units: list[Unit]) -> bool:
    """Begin the files, unless an earlier run has finished something in them."""
    if _begun(partial, writer.plans) and any(unit.key in finished for unit in units):
        return False
    writer.create(replace=True, reserve_bytes=ROOM_BESIDE)
    return True


def _begun(partial: Path, plans: Iterable[ShardPlan]) -> bool:
    return any((partial / (plan.file_name + end)).exists() for plan in plans for end in ("", PARTIAL))


def _work(
    job: Job,
    units: list[Unit],
    diagonals: Diagonals,
    finished: Mapping[str, dict],
    journal: Journal,
    processes: Processes,
    device: torch.device,
    progress: Progress,
    writer: ShardedWriter,
) -> dict[str, str]:
    """Make the units of this process; the digests of the files if it writes all of them."""
    mine = share([unit for unit in units if unit.key not in finished], processes.rank, processes.count)
    total = sum(unit.nbytes for unit in units) if processes.count == 1 else sum(unit.nbytes for unit in mine)
    before = sum(unit.nbytes for unit in units if unit.key in finished) if processes.count == 1 else 0
    progress.begin("harmonize" if job.linears else "merge", total, "B", before)
    keeper = Keeper(writer, journal, digests=processes.count == 1)
    try:
        MergeRun(job, writer, keeper, diagonals, device, progress).run(mine)
    finally:
        keeper.close()
    return keeper.digests()


def _finish(
    job: Job,
    writer: ShardedWriter,
    units: list[Unit],
    digests: dict[str, str],
    partial: Path,
    out: Path,
    identity: dict,
    reports: list[LayerReport],
    journal: Journal,
    progress: Progress,
) -> None:
    """What is done once: masks, side files, hashes, manifest, names."""
    progress.close()
    writer.mark_written([name for unit in units for name in unit.tensors])
    digests = digests or {plan.file_name: writer.digest(plan.file_name) for plan in writer.plans}
    writer.finish()
    copy_side_files(job.source.side_files(), job.source.directory, partial)
    if reports:
        write_masks(partial, {report.name: _masks(job, report) for report in reports})
    write_manifest(partial, identity, manifest_report(reports, job.shared, job.not_covered), digests)
    publish(partial, out, journal)


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
