"""A saved HiDe model into a plain checkpoint, a tensor at a time: the whole of it is never in memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.side_files import copy_side_files
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.hide.assembly import Assignment, assign, merged_assignments, merged_projector
from hpa_ext.hide.checks import check_parts
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.experts import Expert, check_expert, expert_modules
from hpa_ext.hide.fusion import fuse, fuse_into, fuse_projectors, require_finite
from hpa_ext.hide.persistence import check_base, load_parts
from hpa_ext.hide.tensor_files import new_directory
from hpa_ext.models.linears import find_linears

_COPIED_AT_A_TIME = 1 << 24


def merge_checkpoint(
    directory: str | Path,
    base: str | Path,
    out: str | Path,
    task: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Path:
    """Merge a saved HiDe model into a checkpoint that needs nothing of this library; bit for bit what
    `HiDeModel.merge_and_unload` gives.

    The result has the base's own files, names and dtypes; tensors that no expert changes are copied byte for byte. In
    memory are the experts and one tensor at a time.

    Args:
        directory: what `HiDeModel.save` wrote.
        base: directory of the base model's checkpoint in safetensors.
        out: directory to make, whole or not at all; must not exist, or be empty.
        task: whose expert goes into the routed layers with weight 1, and whose projector is taken if projectors are
            routed; None for the fused part alone.
        device: where sums are formed.
        progress: show a bar when stderr is a terminal.

    Returns:
        `out`.

    Raises:
        ValueError: an unknown task, experts that do not fit the base, `out` holds something.
        CheckpointError: the base is quantised or broken, or lacks a weight that an expert changes.
        NumericalError: merged weights that are not finite in the base's dtype; named.
        OSError: a file cannot be read or written.
    """
    experts, anchors, config, settings = load_parts(directory)
    by_task = {expert.task: expert for expert in experts}
    if task is not None and task not in by_task:
        raise ValueError(f"task: expected one of {', '.join(by_task) or '(none)'}, got {task!r}")
    weights = CheckpointWeights(base)
    try:
        check_base(directory, settings, weights.model)
        for expert in experts:
            check_expert(expert, weights.model)
        modules = expert_modules(weights.model)
        check_parts(weights.model, modules, experts, anchors, config)
        chosen = by_task.get(task) if task is not None else None
        assignments = merged_assignments(assign(weights.model, modules, experts, config), chosen)
        projector = acting_projector(weights, experts, config, chosen)
        with new_directory(out) as unfinished:
            _write(weights, assignments, projector, unfinished, torch.device(device), progress)
            copy_side_files(weights.reader.side_files(), weights.reader.directory, unfinished)
    finally:
        weights.close()
    return Path(out)


def acting_projector(
    weights: CheckpointWeights, experts: list[Expert], config: HiDeConfig, chosen: Expert | None
) -> dict[str, Tensor]:
    """The projector of a model whose routed layers hold `chosen` alone, by canonical name; empty where it is the
    base's. NumericalError if it is not finite in the base's dtype.
    """
    owners, how = merged_projector(experts, config, chosen)
    owners = [expert for expert in owners if expert.projector]
    if not owners or how == "base":
        return {}
    base = {name: weights.base_tensor(name) for name in owners[0].projector}
    coefficients = [config.coefficient(expert.task) for expert in owners]
    values = fuse_projectors(base, [dict(expert.projector) for expert in owners], coefficients, how)
    require_finite(next(iter(values)).rpartition(".")[0], list(values.values()), "projectors")
    return values


def _write(
    weights: CheckpointWeights,
    assignments: Mapping[str, Assignment],
    projector: Mapping[str, Tensor],
    directory: Path,
    device: torch.device,
    progress: bool,
) -> None:
    """All files of the base, with what changes in its place."""
    reader = weights.reader
    linears = find_linears(weights.model, list(assignments)) if assignments else {}
    # By the name on disk; asking for each is what refuses a weight that the files lack.
    fused = {_disk_name(weights, f"{name}.weight"): name for name in assignments}
    replaced = {_disk_name(weights, name): value for name, value in projector.items()}
    plans = [ShardPlan.of_shard(shard, {"format": "pt", **shard.metadata}) for shard in reader.shards]
    with ShardedWriter(directory, plans, reader.index()) as writer:
        writer.create()
        for disk in tqdm(reader, desc="merge", unit="tensor", disable=not (progress and sys.stderr.isatty())):
            if disk in fused:
                name = fused[disk]
                found, transposed = assignments[name], linears[name].is_transposed
                weight = reader.read(disk).to(device)
                if not weight.dtype.is_floating_point:
                    raise CheckpointError(f"{reader.path}: {disk} is {weight.dtype}; experts need a floating weight")
                update = fuse(found.updates, found.coefficients, found.fusion)
                merged = fuse_into(weight.mT if transposed else weight, update)
                require_finite(name, [merged], "merged weights")
                writer.write(disk, merged.mT if transposed else merged)
            elif disk in replaced:
                writer.write(disk, replaced[disk])
            else:
                _copy(reader, writer, disk)
        writer.finish()


def _disk_name(weights: CheckpointWeights, name: str) -> str:
    if name not in weights.disk_name:
        weights.base_tensor(name)  # raises, with the reason
    return weights.disk_name[name]


def _copy(reader: CheckpointReader, writer: ShardedWriter, name: str) -> None:
    """The bytes as they are, whatever their type."""
    size = reader.entry(name).nbytes
    buffer = memoryview(bytearray(min(size, _COPIED_AT_A_TIME)))
    for start in range(0, size, _COPIED_AT_A_TIME):
        part = buffer[: min(_COPIED_AT_A_TIME, size - start)]
        reader.read_into(name, start, part)
        writer.write_bytes(name, start, part)
