"""What the compromise of a checkpoint or an adapter will cost, from the inputs' headers and short measurements."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
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
from hpa_ext.costs import Stage, Work, memory, work
from hpa_ext.costs.disk import measure_disk
from hpa_ext.costs.samples import cholesky_rates, energy_rates, product_rates, shortest_seconds, solve_rates
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.estimate import CheckpointPlan, merge_bytes
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.checkpoint.models import entry_of
from hpa_ext.hpa.checkpoint.samples import gram_read_rate, rank_of, read_stage

EVALUATIONS = 4
"""Strengths that the search for a budget takes, about: 2 to 6 over random Grams and budgets of 0.02 to 0.2."""

_MOST_SAMPLE_ROWS = 256


@dataclass(frozen=True)
class _Module:
    """A linear: the width of its input, and the rows of its update (a LoRA's rank, or out_features)."""

    width: int
    rows: int


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
    start = time.perf_counter()
    job = prepare(old, new, safety, task, earlier, config, inputs[2:], modules)
    try:
        check_output(out, inputs)
        opened = time.perf_counter() - start
        found = {}
        for name, linear in job.linears.items():
            rows, width = linear.base_weight().shape
            rank = rank_of(job, name)
            # Of a dense update many more rows than columns are compressed before the search.
            found[name] = _Module(width, rows if rank is None else rank)
        read, written = merge_bytes(job)
        largest = max((entry_of(job.old, f"{name}.weight").nbytes for name in job.names), default=0)
        # A merged weight is the old one and a product, which is HPA's merge without a mask.
        merging = UpdateTimes(job, device, merges=True, method=HPAMethod())
        seconds = sum(merging.seconds(name) for name in job.names)
        return _plan(
            "checkpoint", found, job.method.sources, config, device, out, read_stage(job, read), read, written,
            seconds, 5 * largest, opened,
        )  # fmt: skip
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
    start = time.perf_counter()
    source = AdapterFile(adapter, base)
    try:
        grams = GramSources.open(safety, task, earlier)
        names = source.choose(grams.mappings, modules)
        shapes = {name: source.modules[name].entries["a"].shape for name in names}
        found = {name: _Module(width, rows) for name, (rows, width) in shapes.items()}
        grams.check({name: one.width for name, one in found.items()})
        opened = time.perf_counter() - start
        size = sum(entry.nbytes for entry in source.shard.entries)
        return _plan("adapter", found, grams, config, device, out, _reading(source, size), size, size, 0.0, 0, opened)
    finally:
        source.close()


def _reading(source: AdapterFile, nbytes: int) -> Stage:
    """Reading the adapter, at the rate at which its largest tensor comes."""
    largest = max(source.shard.entries, key=lambda entry: entry.nbytes)
    buffer = bytearray(largest.nbytes)
    seconds = shortest_seconds(lambda: source.read_into(largest.name, memoryview(buffer)), 2)
    rate = max(largest.nbytes, 1) / seconds
    return Stage(nbytes / rate, nbytes / rate)


@dataclass(frozen=True)
class _Times:
    """Seconds of a plan's phases, bytes of Grams to read, and rates."""

    seconds: dict[str, float]
    gram_read: int
    rates: dict[str, float]


def _plan(
    output: str,
    modules: Mapping[str, _Module],
    sources: GramSources,
    config: CompromiseConfig,
    device: torch.device,
    out: str | os.PathLike[str],
    read: Stage,
    read_bytes: int,
    written: int,
    merging: float,
    beside: int,
    opened: float,
) -> CheckpointPlan:
    """The plan of modules by name.

    Args:
        read: of all tensors.
        merging: seconds that the result of solving takes to become weights.
        beside: what else is in memory.
        opened: seconds that opening took.
    """
    groups = sources.groups(list(modules))
    count = len(sources.mappings)
    parent = partial_directory(Path(out)).parent
    disk = measure_disk(parent)
    times = _arithmetic(modules, groups, sources, config, device)
    # An adapter's modules are synced one by one, a checkpoint's layer by layer beside the arithmetic.
    syncs = 2 * len(modules) if output == "adapter" else len(groups) // 2
    kept = disk.kept(written, syncs)
    transfer = read.seconds + disk.written(written).seconds + kept.seconds
    seconds = times.seconds | {"open": opened}
    computing = sum(times.seconds.values()) + merging
    if output == "adapter":
        seconds["read and write"] = transfer
    else:
        seconds["merge"] = merging
        # Beside each other: what is left of reading and writing once the arithmetic is done.
        seconds["read and write"] = max(max(read.seconds, kept.seconds) - computing, kept.seconds / max(len(groups), 1))
    widest = max(modules.values(), key=lambda one: (one.width, one.rows), default=None)
    highest = [0, 0]
    if widest is not None:
        highest = [
            max(memory.compromise(one.width, one.rows, count, float64=wide) for one in set(modules.values())) + beside
            for wide in (False, True)
        ]
    return CheckpointPlan(
        output=output,
        modules=len(modules),
        grams=len(groups) * count,
        read_bytes=read_bytes + times.gram_read,
        write_bytes=written,
        free_bytes=free_bytes(parent),
        memory_bytes=highest[0],
        memory_bytes_float64=highest[1],
        seconds=seconds,
        rates=times.rates | {"write": 1 / (1 / disk.copy + 1 / disk.sync), "hash": disk.hash},
    )


def _arithmetic(
    modules: Mapping[str, _Module],
    groups: Sequence[Sequence[str]],
    sources: GramSources,
    config: CompromiseConfig,
    device: torch.device,
) -> _Times:
    """Reading the Grams, factoring their sums, and solving."""
    if not modules:
        return _Times({"read Grams": 0.0, "factor": 0.0, "solve": 0.0}, 0, {})
    count, tried = len(sources.mappings), _tried(config)
    factors = Work()
    solves: dict[int, list[Work]] = {}
    for group in groups:
        for index, name in enumerate(group):
            one = modules[name]
            # At one strength the linears of an input share its factor.
            times = tried if config.strength is None or index == 0 else 0
            factors += times * work.cholesky(one.width, min(count, 3))
            searched = tried if config.strength is None else 0
            # Rows times each Gram, before and after, and at each strength that is tried.
            parts = solves.setdefault(one.rows, [Work(), Work(), Work()])
            parts[0] += tried * work.solve_rows(one.rows, one.width)
            parts[1] += (2 * count + searched) * work.product(one.rows, one.width)
            parts[2] += (2 * count + searched + 2) * work.energy(one.rows, one.width)
    widest = max(one.width for one in modules.values())
    factor_rates = cholesky_rates(widest, min(count, 3), device)
    factoring = factor_rates.seconds(factors)
    solving = 0.0
    for rows, parts in _by_rates(solves):
        kinds = (solve_rates, product_rates, energy_rates)
        rates = [kind(widest, rows, device) for kind in kinds[:2]] + [energy_rates(rows, device)]
        solving += sum(one.seconds(part) for one, part in zip(rates, parts, strict=True))
    found = {"factor": factors.operations / factoring} if factoring else {}
    files = [grams for grams in sources.mappings.values() if isinstance(grams, GramFile)]
    gram_read, reading = 0, 0.0
    if files:
        gram_read = sum(len(files) * work.triangle_bytes(modules[group[0]].width) for group in groups)
        narrowest = min((group[0] for group in groups), key=lambda name: modules[name].width)
        found["grams"] = gram_read_rate(files, narrowest, device, matrix=True)
        reading = gram_read / found["grams"]
    return _Times({"read Grams": reading, "factor": factoring, "solve": solving}, gram_read, found)


def _by_rates(solves: Mapping[int, list[Work]]) -> list[tuple[int, list[Work]]]:
    """Work by the number of rows that its rates are measured with, at most `_MOST_SAMPLE_ROWS` and two of them."""
    merged: dict[int, list[Work]] = {}
    for rows, parts in sorted(solves.items()):
        measured = min(rows, _MOST_SAMPLE_ROWS)
        near = next((other for other in merged if measured <= 2 * other), measured)
        held = merged.setdefault(near, [Work()] * len(parts))
        merged[near] = [one + more for one, more in zip(held, parts, strict=True)]
    return list(merged.items())


def _tried(config: CompromiseConfig) -> int:
    """Strengths to try for a linear, about."""
    if config.strength is not None:
        return 1
    return EVALUATIONS if 0 < config.budget < 1 else 0
