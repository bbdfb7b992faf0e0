"""What the compromise of a checkpoint or an adapter will cost, from the inputs' headers and short measurements."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hpa_ext.checkpoints.files import free_bytes
from hpa_ext.checkpoints.output import check_output, partial_directory
from hpa_ext.compromise.adapter import directories_of
from hpa_ext.compromise.adapter_file import AdapterFile, BaseModel
from hpa_ext.compromise.checkpoint import check_adapter, prepare
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.layer import checked_config
from hpa_ext.compromise.times import LinearShape, merging_seconds, solving_times
from hpa_ext.costs import Stage, memory, pipeline_seconds
from hpa_ext.costs.disk import measure_disk
from hpa_ext.costs.samples import shortest_seconds
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.estimate import FIXED_SYNCS, CheckpointPlan, merge_bytes, pool_bytes
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.checkpoint.pieces import cut
from hpa_ext.hpa.checkpoint.samples import rank_of, read_stage

# At the begin and the end of `harmonize_adapter`, as FIXED_SYNCS.
_ADAPTER_SYNCS = 18


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
        check_adapter(new)
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
            found[name] = LinearShape(width, rows if rank is None else rank)
        read, written = merge_bytes(job)
        kind_of = job.kind_of()
        order = [module for name in job.source.entries for kind, module in [kind_of(name)] if kind == "merge"]
        found = {name: found[name] for name in order}
        seconds = merging_seconds(job, device)
        syncs = 2 * len(cut(job.source, kind_of)) + FIXED_SYNCS["checkpoint"]
        return _plan(
            "checkpoint", found, job.method.sources, config, device, out, read_stage(job, read), read, written,
            seconds, pool_bytes(job), opened, syncs,
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
        found = {name: LinearShape(width, rows) for name, (rows, width) in shapes.items()}
        grams.check({name: one.width for name, one in found.items()})
        opened = time.perf_counter() - start
        size = sum(entry.nbytes for entry in source.shard.entries)
        # The module and its line in the journal.
        syncs = 2 * len(names) + _ADAPTER_SYNCS
        return _plan(
            "adapter", found, grams, config, device, out, _reading(source, size), size, size, 0.0, 0, opened, syncs
        )
    finally:
        source.close()


def _reading(source: AdapterFile, nbytes: int) -> Stage:
    """Reading the adapter, at the rate at which its largest tensor comes."""
    largest = max(source.shard.entries, key=lambda entry: entry.nbytes)
    buffer = bytearray(largest.nbytes)
    seconds = shortest_seconds(lambda: source.read_into(largest.name, memoryview(buffer)), 2)
    rate = max(largest.nbytes, 1) / seconds
    return Stage(nbytes / rate, nbytes / rate)


def _plan(
    output: str,
    modules: Mapping[str, LinearShape],
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
    syncs: int,
) -> CheckpointPlan:
    """The plan of modules by name.

    Args:
        read: of all tensors.
        merging: seconds that the result of solving takes to become weights.
        beside: what else is in memory.
        opened: seconds that opening took.
        syncs: how often the run waits for the disk.
    """
    groups = sources.groups(list(modules))
    count = len(sources.mappings)
    inputs = groups if output == "adapter" else _in_a_row(groups, list(modules))
    parent = partial_directory(Path(out)).parent
    disk = measure_disk(parent)
    times = solving_times(modules, inputs, sources, config, device)
    kept = disk.kept(written, syncs)
    write = disk.written(written)
    computing = sum(times.seconds.values()) + merging
    seconds = times.seconds | {"open": opened}
    if output == "adapter":  # one after the other
        seconds["read and write"] = read.seconds + write.seconds + kept.seconds
    else:
        cores = len(os.sched_getaffinity(0))
        compute = Stage(computing, computing * min(torch.get_num_threads(), cores))
        # Beside the arithmetic, whose cores they take; the last layer is kept when all is computed.
        whole = pipeline_seconds((read, compute, write, kept), cores)
        last = kept.seconds / max(len(groups), 1)
        seconds |= {"merge": merging, "read and write": max(whole - computing, last)}
    highest = [
        max((memory.compromise(one.width, one.rows, count, float64=wide) for one in set(modules.values())), default=0)
        + beside
        + memory.ALLOCATOR
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
        syncs=syncs,
    )


def _in_a_row(groups: Sequence[Sequence[str]], order: Sequence[str]) -> list[list[str]]:
    """The modules by input, where an input that comes again after another one counts again: only the last is kept."""
    group_of = {name: index for index, group in enumerate(groups) for name in group}
    return [list(names) for _, names in itertools.groupby(order, key=group_of.__getitem__)]
