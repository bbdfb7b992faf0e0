"""What a run will cost in bytes, memory and time, from the inputs' headers and a short measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hpa_ext.checkpoints.files import free_bytes
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.output import check_output, partial_directory
from hpa_ext.costs import Stage, Work, memory, pipeline_seconds, work
from hpa_ext.costs.disk import DiskRates, measure_disk
from hpa_ext.costs.samples import inverse_diagonal_rates
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.bundles import bundles
from hpa_ext.hpa.checkpoint.checkpoint_output import ROOM_BESIDE
from hpa_ext.hpa.checkpoint.grams import GramSource, leaders
from hpa_ext.hpa.checkpoint.job import Job, prepare
from hpa_ext.hpa.checkpoint.models import entry_of
from hpa_ext.hpa.checkpoint.pieces import cut
from hpa_ext.hpa.checkpoint.reduce import SETS
from hpa_ext.hpa.checkpoint.samples import UpdateTimes, dtype_of, gram_read_rate, rank_of, read_stage
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.reporting.units import bytes_text, duration_text

FIXED_SYNCS = {"checkpoint": 24, "adapter": 19}
"""How often a run waits for the disk at its begin and its end: journal, manifest, masks, names, directories."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What `harmonize_checkpoint` with the same arguments will do.

    Attributes:
        modules: how many weights are harmonized.
        grams: how many distinct whole Grams there are to work through, all sets together; 0 if they are reduced
            already.
        read_bytes, write_bytes: from and to the disk.
        free_bytes: on the output's filesystem.
        memory_bytes: at the highest, beyond the interpreter and torch. With Grams that float32 cannot factor,
            `memory_bytes_float64`.
        seconds: per phase, from rates measured on the first weight; on a machine that does nothing else.
        rates: what was measured, bytes per second (of the inverse, operations per second).
        syncs: how often it waits for the disk: at the begin and the end, and for what is finished in between.
    """

    output: str
    modules: int
    grams: int
    read_bytes: int
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    memory_bytes_float64: int
    seconds: dict[str, float]
    rates: dict[str, float] = field(default_factory=dict)
    syncs: int = 0

    @property
    def fits(self) -> bool:
        """Whether there is room for the output, and for what lies beside the weights of a whole checkpoint."""
        return self.write_bytes + (ROOM_BESIDE if self.output == "checkpoint" else 0) <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"fits": self.fits}

    def __str__(self) -> str:
        memory, float64 = bytes_text(self.memory_bytes), bytes_text(self.memory_bytes_float64)
        if float64 != memory:
            memory += f", {float64} where a Gram needs float64"
        room = "" if self.fits else ": NOT ENOUGH"
        lines = [
            f"output   {self.output}",
            f"weights  {self.modules} to harmonize, {self.grams} whole Grams",
            f"disk     {bytes_text(self.read_bytes)} to read, {bytes_text(self.write_bytes)} to write, "
            f"{bytes_text(self.free_bytes)} free{room}",
            f"memory   {memory}, beyond the interpreter",
            f"time     about {duration_text(sum(self.seconds.values()))} "
            f"({', '.join(f'{name} {duration_text(value)}' for name, value in self.seconds.items())})",
        ]
        return "\n".join(lines)


def plan_checkpoint(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: HPAConfig | None = None,
    *,
    output: str = "checkpoint",
    old_adapters: Sequence[str | os.PathLike[str]] = (),
    modules: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> CheckpointPlan:
    """What `harmonize_checkpoint` with the same arguments would cost; raises what it would raise before its work.

    Nothing is left on the disk: the rate of writing is measured with a file that has no name.
    """
    inputs = input_paths(out, old_adapters, old=old, new=new)
    device = usable_device(device)
    start = time.perf_counter()
    job = prepare(old, new, safety, task, config, output, inputs[2:], modules)
    try:
        check_output(out, inputs)
        opened = time.perf_counter() - start
        parent = partial_directory(out).parent
        disk = measure_disk(parent)
        factored = _factored(job)
        gram_read, inverting, rates = _inverses(job, factored, disk, device)
        merge_read, written = merge_bytes(job)
        update_times = UpdateTimes(job, device, merges=job.output == "checkpoint")
        computing = sum(update_times.seconds(name) for name in job.names)
        reading = read_stage(job, merge_read)
        syncs = len(job.names) if job.output == "adapter" else 2 * len(cut(job.source, job.kind_of()))
        harmonizing = _pipelined(job, reading, computing, written, disk, syncs)
        weight_bytes = sum(entry_of(job.old, f"{name}.weight").nbytes for name in job.names)
        rates |= {
            "read": merge_read / reading.seconds,
            "compute": weight_bytes / max(computing, 1e-9),
            "write": 1 / (1 / disk.copy + 1 / disk.sync),
            "hash": disk.hash,
        }
        widest = max((job.linears[module].base_weight().shape[1] for _, module in factored), default=0)
        merging = _merging_memory(job)
        return CheckpointPlan(
            output=job.output,
            modules=len(job.names),
            grams=len(factored),
            read_bytes=merge_read + gram_read,
            write_bytes=written,
            free_bytes=free_bytes(parent),
            memory_bytes=memory.ALLOCATOR + max(merging, memory.inverse_diagonal(widest)),
            memory_bytes_float64=memory.ALLOCATOR + max(merging, memory.inverse_diagonal(widest, float64=True)),
            seconds={"open": opened, "inverse diagonals": inverting, "harmonize": harmonizing},
            rates=rates,
            syncs=len(factored) + syncs + FIXED_SYNCS[job.output],
        )
    finally:
        job.close()


def _inverses(
    job: Job, factored: Sequence[tuple[str, str]], disk: DiskRates, device: torch.device
) -> tuple[int, float, dict[str, float]]:
    """Of the first phase: bytes to read, seconds, and rates."""
    widths = [job.linears[module].base_weight().shape[1] for _, module in factored]
    if not widths:
        return 0, 0.0, {}
    inverse = inverse_diagonal_rates(max(widths), device)
    done = sum((work.inverse_diagonal(width) for width in widths), Work())
    computing = inverse.seconds(done)
    rates = {"inverse": done.operations / computing}
    files = {kind: getattr(job, kind) for kind in SETS if isinstance(getattr(job, kind), GramFile)}
    read = sum(work.triangle_bytes(width) for (kind, _), width in zip(factored, widths, strict=True) if kind in files)
    reading = 0.0
    if read:
        rates["grams"] = gram_read_rate(files.values(), [module for _, module in factored], device)
        reading = read / rates["grams"]
    return read, reading + computing + len(widths) * disk.sync_seconds, rates


def _pipelined(job: Job, reading: Stage, computing: float, written: int, disk: DiskRates, syncs: int) -> float:
    """Seconds of the second phase: reading, computing, writing and keeping, beside each other."""
    cores = len(os.sched_getaffinity(0))
    compute = Stage(computing, computing * min(torch.get_num_threads(), cores))
    ending = FIXED_SYNCS[job.output] * disk.sync_seconds
    if job.output == "adapter":
        scored = pipeline_seconds((reading, compute, disk.kept(0, syncs)), cores)
        # The adapter itself is copied afterwards, and its manifest reads it once more.
        return scored + disk.written(2 * written).seconds + disk.kept(written, 0).seconds + ending
    write, keep = disk.written(written), disk.kept(written, syncs)
    # When the last weight is written, its unit still has to be kept.
    units = cut(job.source, job.kind_of())
    last = disk.kept(units[-1].nbytes if units else 0, 2)
    before = max(reading.seconds, compute.seconds, write.seconds)
    return max(pipeline_seconds((reading, compute, write, keep), cores), before + last.seconds) + ending


def _merging_memory(job: Job) -> int:
    """Of the second phase at its highest: the pipeline's pool of buffers, and what the arithmetic needs beside it."""
    beside = max((_beside(job, name) for name in job.names), default=0)
    if job.output == "adapter":
        # Without a pool: one weight is read while another is scored.
        return 2 * max((entry_of(job.old, f"{name}.weight").nbytes for name in job.names), default=0) + beside
    return pool_bytes(job) + beside


def pool_bytes(job: Job) -> int:
    """The buffers of a run that writes a checkpoint."""
    items = []
    for bundle in bundles(cut(job.source, job.kind_of())):
        # Weights that go through together lie one behind the other: the old ones, and the new ones where there are any.
        dense = [p.nbytes for p in bundle.pieces if p.kind == "merge" and rank_of(job, p.module) is None]
        items.append([[bundle.nbytes] * (2 if dense else 1)])
    return memory.pipeline_pool(items)


def _beside(job: Job, module: str) -> int:
    """What computing with a module takes beside its tensors."""
    rank = rank_of(job, module)
    if rank is None:
        return 0
    one = torch.zeros(1, 1, dtype=dtype_of(job, module))
    native = LowRankUpdate(one, one, one, 1.0).backend()["low_rank"] == "native"
    return memory.low_rank_scratch(*job.linears[module].base_weight().shape, rank, native=native)


def _factored(job: Job) -> list[tuple[str, str]]:
    """The Grams that are not reduced yet, by set and the first module that has each."""
    found = []
    for name in SETS:
        grams = getattr(job, name)
        for leader in dict.fromkeys(leaders(grams, job.names).values()):
            if isinstance(grams, GramFile):
                reduced = grams.form != "triangle"
            else:
                reduced = isinstance(grams[leader], GramDiagonal)
            if not reduced:
                found.append((name, leader))
    return found


def merge_bytes(job: Job) -> tuple[int, int]:
    """Bytes that the second phase reads and writes."""
    kind_of = job.kind_of()
    harmonized = [entry.nbytes for entry in job.source.entries.values() if kind_of(entry.name)[0] == "merge"]
    if job.output == "adapter":
        adapter = sum(entry.nbytes for entry in job.adapter.shard.entries)  # what is not harmonized comes along
        gains = sum(4 * linear.base_weight().shape[1] for linear in job.linears.values())
        return sum(harmonized) + adapter, adapter + gains
    adapter = sum(entry.nbytes for name in job.names for entry in _adapter_entries(job, name))
    again = sum(harmonized) if job.adapter is None else adapter
    return job.source.nbytes + again, job.source.nbytes


def _adapter_entries(job: Job, module: str) -> list:
    found = job.adapter is not None and module in job.adapter.updates
    return list(job.adapter.entries(module).values()) if found else []
