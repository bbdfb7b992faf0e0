"""What the compromise of a checkpoint or an adapter will cost, from the inputs' headers and short measurements."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpa_ext.checkpoints.files import free_bytes
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.output import check_output, partial_directory
from hpa_ext.compromise.adapter import directories_of
from hpa_ext.compromise.adapter_file import AdapterFile, BaseModel
from hpa_ext.compromise.checkpoint import prepare
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.layer import checked_config
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.estimate import CheckpointPlan, merge_bytes, write_rate
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.checkpoint.job import has_low_rank
from hpa_ext.ops.cholesky import cholesky

EVALUATIONS = 4
"""Strengths that the search for a budget takes, about: 2 to 6 over random Grams and budgets of 0.02 to 0.2."""

_SAMPLE_WIDTH = 2048
_SAMPLE_ROWS = 128
_SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class _Module:
    """A linear: the width of its input, the rows of its update (a LoRA's rank, or out), and their bytes on disk."""

    width: int
    rows: int
    nbytes: int


def plan_checkpoint(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    output: str = "checkpoint",
    old_adapters: Sequence[str | os.PathLike[str]] = (),
    modules: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> CheckpointPlan:
    """What `hpa_ext.compromise.checkpoint.harmonize_checkpoint` with the same arguments would cost.

    Nothing is left on the disk. Raises what it would raise before its work.
    """
    if output == "adapter":
        return plan_adapter(
            new, safety, task, out, config, earlier=earlier, base=Path(old), modules=modules, device=device
        )
    if output != "checkpoint":
        raise ValueError(f"output: expected one of checkpoint, adapter, got {output!r}")
    config, inputs, device = (
        checked_config(config),
        input_paths(out, old_adapters, old=old, new=new),
        usable_device(device),
    )
    job = prepare(old, new, safety, task, earlier, config, inputs[2:], modules)
    try:
        check_output(out, inputs)
        found = {}
        for name, linear in job.linears.items():
            weight = linear.base_weight()
            low_rank = job.adapter is not None and has_low_rank(job.adapter, name)
            # Many more rows than columns are compressed before the search.
            rows = job.adapter.updates[name].a.shape[0] if low_rank else weight.shape[0]
            found[name] = _Module(weight.shape[1], rows, weight.numel() * weight.element_size())
        read, written = merge_bytes(job)
        beside = 5 * max((one.nbytes for one in found.values()), default=0)
        return _plan("checkpoint", found, job.method.sources, config, device, out, read, written, beside)
    finally:
        job.close()


def plan_adapter(
    adapter: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    base: BaseModel | None = None,
    modules: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> CheckpointPlan:
    """What `harmonize_adapter` with the same arguments would cost; see `plan_checkpoint`."""
    config, device = checked_config(config), usable_device(device)
    inputs = input_paths(out, [], adapter=adapter) + directories_of(base)
    check_output(out, inputs)
    source = AdapterFile(adapter, base)
    try:
        grams = GramSources.open(safety, task, earlier)
        names = source.choose(grams.mappings, modules)
        found = {}
        for name in names:
            entries = source.modules[name].entries
            rows, width = entries["a"].shape
            found[name] = _Module(width, rows, entries["a"].nbytes + entries["b"].nbytes)
        grams.check({name: one.width for name, one in found.items()})
        size = sum(entry.nbytes for entry in source.shard.entries)
        return _plan("adapter", found, grams, config, device, out, size, size, 0)
    finally:
        source.close()


def _plan(
    output: str,
    modules: Mapping[str, _Module],
    sources: GramSources,
    config: CompromiseConfig,
    device: torch.device,
    out: str | os.PathLike[str],
    read: int,
    written: int,
    beside: int,
) -> CheckpointPlan:
    """The plan of modules by name; `beside` is what else is in memory."""
    groups = sources.groups(list(modules))
    count = len(sources.mappings)
    parent = partial_directory(Path(out)).parent
    rates = _measure(modules, groups, sources, device, parent)
    files = [grams for grams in sources.mappings.values() if isinstance(grams, GramFile)]
    gram_read = sum(len(files) * 2 * modules[group[0]].width * (modules[group[0]].width + 1) for group in groups)
    factors = solves = products = 0.0
    for group in groups:
        for index, name in enumerate(group):
            one = modules[name]
            tried = _tried(config)
            # At one strength the linears of an input share its factor.
            factors += (tried if config.strength is None or index == 0 else 0) * one.width**3 / 3
            solves += tried * 4 * one.rows * one.width**2
            searched = tried if config.strength is None else 0
            products += (2 * count + searched) * 2 * one.rows * one.width**2
    seconds = {
        "read Grams": gram_read / rates["grams"] if files else 0.0,
        "factor": factors / rates["factor"],
        "solve": solves / rates["solve"] + products / rates["product"],
        "read and write": read / rates["read"] + written / min(rates["write"], rates["hash"]),
    }
    widest = max((one.width for one in modules.values()), default=0)
    rows = max((4 * one.rows * one.width for one in modules.values()), default=0)
    # The matrices, their sum and its factor, half a square; in float64 the sum and a whole square.
    square = 4 * widest**2
    held = min(count, 3)  # of earlier tasks the sum alone is kept
    return CheckpointPlan(
        output=output,
        modules=len(modules),
        grams=len(groups) * count,
        read_bytes=read + gram_read,
        write_bytes=written,
        free_bytes=free_bytes(parent),
        memory_bytes=math.ceil((held + 1.5 + (count > 3)) * square) + (count + 5) * rows + beside,
        memory_bytes_float64=(held + 4) * square + (count + 7) * rows + beside,
        seconds=seconds,
        rates=rates,
    )


def _tried(config: CompromiseConfig) -> int:
    """Strengths to try for a linear, about."""
    if config.strength is not None:
        return 1
    return EVALUATIONS if 0 < config.budget < 1 else 0


def _measure(
    modules: Mapping[str, _Module],
    groups: Sequence[Sequence[str]],
    sources: GramSources,
    device: torch.device,
    parent: Path,
) -> dict[str, float]:
    """Bytes a second of reading Grams, reading, writing and hashing; operations a second of the arithmetic."""
    width = min(max((one.width for one in modules.values()), default=_SAMPLE_WIDTH), _SAMPLE_WIDTH)
    count = min(max((one.rows for one in modules.values()), default=_SAMPLE_ROWS), _SAMPLE_ROWS)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=generator).to(device)
    sample = torch.eye(width, device=device)
    diagonal = sample.diagonal().double()
    factor = cholesky(sample.clone(), diagonal)
    factored, solved = _seconds(lambda: cholesky(sample.clone(), diagonal)), _seconds(lambda: factor.solve_rows(rows))
    rates = {
        "factor": width**3 / 3 / factored,
        "solve": 4 * count * width**2 / solved,
        "product": 2 * count * width**2 / _seconds(lambda: (rows @ sample)[0, 0].item()),
        "grams": 1e9,
        "read": 1e9,
    }
    file = next((grams for grams in sources.mappings.values() if isinstance(grams, GramFile)), None)
    if file is not None and groups:
        name = min((group[0] for group in groups), key=lambda name: modules[name].width)
        rates["grams"] = 2 * modules[name].width ** 2 / _seconds(lambda: _read_gram(file, name, device), 1)
    buffer = bytes(_SAMPLE_BYTES)
    rates["hash"] = len(buffer) / _seconds(lambda: hashlib.sha256(buffer), 1)
    rates["write"] = write_rate(parent, buffer)
    return rates


def _read_gram(file: GramFile, name: str, device: torch.device) -> None:
    matrix = file[name].matrix().to(device)
    bool(torch.isfinite(matrix).all())
    file.forget()


def _seconds(work: Callable[[], object], repeats: int = 2) -> float:
    """The shortest time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
