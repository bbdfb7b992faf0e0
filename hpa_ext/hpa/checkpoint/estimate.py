"""What a run will cost in bytes, memory and time, from the inputs' headers and a short measurement."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpa_ext import ops
from hpa_ext.checkpoints.files import free_bytes
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.output import check_output, partial_directory
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.checkpoint_output import ROOM_BESIDE
from hpa_ext.hpa.checkpoint.grams import GramSource, leaders
from hpa_ext.hpa.checkpoint.job import Job, has_low_rank, prepare
from hpa_ext.hpa.checkpoint.merge import merged_weights, moved, plan_modules
from hpa_ext.hpa.checkpoint.reduce import SETS
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.reporting.units import bytes_text, duration_text

# The sample of the inverse: large enough for the rate of blocked code, a quarter of a second at most.
_SAMPLE_WIDTH = 1024
_SAMPLE_BYTES = 64 << 20


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

    @property
    def fits(self) -> bool:
        """Whether there is room for the output, and for what lies beside the weights of a whole checkpoint."""
        return self.write_bytes + (ROOM_BESIDE if self.output == "checkpoint" else 0) <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"fits": self.fits}

    def __str__(self) -> str:
        memory = bytes_text(self.memory_bytes)
        if self.memory_bytes_float64 > self.memory_bytes:
            memory += f", {bytes_text(self.memory_bytes_float64)} where a Gram needs float64"
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
    job = prepare(old, new, safety, task, config, output, inputs[2:], modules)
    try:
        check_output(out, inputs)
        factored = _factored(job)
        parent = partial_directory(out).parent
        rates = _measure(job, device, parent)
        weights = [linear.base_weight() for linear in job.linears.values()]
        merge_read, written = merge_bytes(job)
        gram_read = sum(2 * width * (width + 1) for _, width in factored)
        operations = sum(2 / 3 * width**3 for _, width in factored)
        stages = {
            "read": merge_read / rates["read"],
            "compute": sum(w.numel() * w.element_size() for w in weights) / rates["compute"],
            "write": written / rates["write"],
            "hash": written / rates["hash"],
        }
        # Reading and writing wait for the disk; computing and hashing share the cores.
        cores = max(1, torch.get_num_threads())
        overlapped = max(stages["read"], stages["write"], stages["compute"] + stages["hash"] / cores)
        largest = max((w.numel() * w.element_size() for w in weights), default=0)
        widest = max((width for _, width in factored), default=0)
        merging = largest * (5 if job.adapter is None else 4)
        return CheckpointPlan(
            output=job.output,
            modules=len(weights),
            grams=len(factored),
            read_bytes=merge_read + gram_read,
            write_bytes=written,
            free_bytes=free_bytes(parent),
            memory_bytes=max(merging, 8 * widest**2),
            memory_bytes_float64=max(merging, 12 * widest**2),
            seconds={
                "inverse diagonals": gram_read / rates["read"] + operations / rates["inverse"] if factored else 0.0,
                "harmonize": overlapped,
            },
            rates=rates,
        )
    finally:
        job.close()


def _factored(job: Job) -> list[tuple[str, int]]:
    """The Grams that are not reduced yet, by set and width."""
    found = []
    for name in SETS:
        grams = getattr(job, name)
        for leader in dict.fromkeys(leaders(grams, job.names).values()):
            if isinstance(grams, GramFile):
                reduced = grams.form != "triangle"
            else:
                reduced = isinstance(grams[leader], GramDiagonal)
            if not reduced:
                found.append((name, job.linears[leader].base_weight().shape[1]))
    return found


def merge_bytes(job: Job) -> tuple[int, int]:
    """Bytes that the second phase reads and writes."""
    kind_of = job.kind_of()
    harmonized = [entry.nbytes for entry in job.source.entries.values() if kind_of(entry.name)[0] == "merge"]
    adapter = sum(entry.nbytes for name in job.names for entry in _adapter_entries(job, name))
    if job.output == "adapter":
        gains = sum(4 * linear.base_weight().shape[1] for linear in job.linears.values())
        return sum(harmonized) + adapter, adapter + gains
    again = sum(harmonized) if job.adapter is None else adapter
    return job.source.nbytes + again, job.source.nbytes


def _adapter_entries(job: Job, module: str) -> list:
    found = job.adapter is not None and module in job.adapter.updates
    return list(job.adapter.entries(module).values()) if found else []


def _measure(job: Job, device: torch.device, parent: Path) -> dict[str, float]:
    """Rates in bytes a second: of reading, computing, writing and hashing; of the inverse, operations a second."""
    rates = {"read": 1e9, "compute": 1e9}
    if job.names:
        module = job.names[0]
        start = time.perf_counter()
        update = job.weight_update(module)
        read = time.perf_counter() - start
        size = update.old.numel() * update.old.element_size()
        dense = job.adapter is None or not has_low_rank(job.adapter, module)
        rates["read"] = (2 * size if dense else size) / read
        diagonals = {name: {module: _flat_diagonal(update.shape[1], job.config.damping)} for name in SETS}
        start = time.perf_counter()
        on_device = moved(update, device)
        merged_weights(plan_modules(job, diagonals, [module], [on_device]), [on_device])[0].cpu()
        rates["compute"] = size / (time.perf_counter() - start)
    sample = torch.eye(_SAMPLE_WIDTH, device=device)
    ops.inverse_diagonal(sample[:8, :8].contiguous(), 0.01)
    start = time.perf_counter()
    ops.inverse_diagonal(sample, 0.01, assume_symmetric=True)
    rates["inverse"] = 2 / 3 * _SAMPLE_WIDTH**3 / (time.perf_counter() - start)
    buffer = bytes(_SAMPLE_BYTES)
    start = time.perf_counter()
    hashlib.sha256(buffer)
    rates["hash"] = len(buffer) / (time.perf_counter() - start)
    rates["write"] = write_rate(parent, buffer)
    return rates


def _flat_diagonal(width: int, damping: float) -> GramDiagonal:
    return GramDiagonal(torch.ones(width), torch.zeros(width, dtype=torch.bool), 1, damping, damping, 32)


def write_rate(parent: Path, buffer: bytes) -> float:
    """Through to the disk, with a file without a name; where there are none, a guess of 0.5 GB/s."""
    try:
        descriptor = os.open(parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return 0.5e9
    try:
        start = time.perf_counter()
        os.write(descriptor, buffer)
        os.fdatasync(descriptor)
        return len(buffer) / (time.perf_counter() - start)
    except OSError:
        return 0.5e9
    finally:
        os.close(descriptor)
