"""The result of an HPA step as an adapter: A without the retained columns, B as it was, and a gain for W's columns.

``W_hat = W_old diag(g) + s B (A * (1 - m))`` with ``g = 1 - c (1 - m)``: exact for a LoRA update and input granularity,
since the mask and the orthogonal adjustment act on whole columns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.adapter import EXTRA_FILE, WEIGHTS_FILE, LoraAdapter
from hpa_ext.checkpoints.adapter_config import CONFIG_FILE
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import write_atomically
from hpa_ext.checkpoints.gain_file import GAIN_FILE, GAIN_MARK, gain_bytes, sha256_of
from hpa_ext.checkpoints.manifest import write_manifest
from hpa_ext.checkpoints.output import check_output, partial_directory, publish
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.side_files import copy_side_files, side_files
from hpa_ext.checkpoints.writer import ShardedWriter


def write_harmonized_adapter(
    source: LoraAdapter, retained: Mapping[str, Tensor], gain: Mapping[str, Tensor], directory: str | Path
) -> None:
    """Write the files of a harmonized adapter into a directory that exists; files of an earlier attempt are replaced.

    The tensors are copied one at a time: names, dtypes and order as in `source`, A with zeros in the retained columns.
    ``adapter_config.json`` and what else lies beside the adapter (tokenizer, model card) come along unchanged. The
    caller writes the manifest and publishes (`hpa_ext.checkpoints.output`).

    Args:
        source: the adapter that the step trained.
        retained: bool ``[in]`` by canonical module name, True where the column of the old weight is kept.
        gain: ``[in]`` by canonical module name, what the columns of the old weight are multiplied with (float32 in the
            file); the same modules as `retained`. 1 where retained.
        directory: where to.

    Raises:
        ValueError: a module that the adapter does not tune or tunes by something other than ``s B A`` (DoRA, a replaced
            weight), a wrong shape or dtype, an adapter that was harmonized before.
    """
    directory = Path(directory)
    _check(source, retained, gain)
    contents = gain_bytes(gain)
    plan = ShardPlan.of_shard(source.shard, {**source.metadata, GAIN_MARK: sha256_of(contents)})
    masks = {source.entries(name)["a"].name: mask for name, mask in retained.items()}
    with ShardedWriter(directory, [plan]) as writer:
        writer.create(replace=True)
        for entry in source.shard.entries:
            if entry.name in masks:
                a = source.read(entry.name)
                writer.write(entry.name, a.masked_fill(masks[entry.name].cpu(), 0))
            else:
                buffer = bytearray(entry.nbytes)
                source.read_into(entry.name, memoryview(buffer))
                writer.write_bytes(entry.name, 0, memoryview(buffer))
        writer.finish()
    shutil.copyfile(source.directory / CONFIG_FILE, directory / CONFIG_FILE)
    if (source.directory / EXTRA_FILE).is_file():
        shutil.copyfile(source.directory / EXTRA_FILE, directory / EXTRA_FILE)
    copy_side_files(side_files(source.directory), source.directory, directory)
    write_atomically(directory / GAIN_FILE, contents)


def mark_gain(directory: str | Path, gain: Mapping[str, Tensor]) -> None:
    """Put a gain beside an adapter that PEFT has just saved, and the mark that belongs to it into the adapter's header.

    Raises OSError when the files cannot be read or written.
    """
    import safetensors.torch

    directory = Path(directory)
    contents = gain_bytes(gain)
    path = directory / WEIGHTS_FILE
    tensors = safetensors.torch.load_file(path)
    marked = safetensors.torch.save(tensors, metadata={"format": "pt", GAIN_MARK: sha256_of(contents)})
    # The gain first: an adapter that is marked is never without it.
    write_atomically(directory / GAIN_FILE, contents)
    write_atomically(path, marked)


@contextmanager
def new_adapter_directory(out: str | Path, identity: Mapping[str, Any], inputs: list[Path]) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends without an error, and is removed otherwise."""
    check_output(out, inputs)
    partial = partial_directory(out)
    if partial.exists():
        raise FileExistsError(f"{partial}: left by a run that did not finish; delete it")
    partial.mkdir()
    try:
        yield partial
        write_manifest(partial, identity)
        publish(partial, Path(out))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check(source: LoraAdapter, retained: Mapping[str, Tensor], gain: Mapping[str, Tensor]) -> None:
    if source.gain:
        raise CheckpointError(f"{source.directory}: was harmonized already; expected the adapter that the step trained")
    if set(retained) != set(gain):
        odd = sorted(set(retained) ^ set(gain))[0]
        raise ValueError(f"retained, gain: expected the same modules, got {odd!r} in one of them alone")
    for name, mask in retained.items():
        if name not in source.updates:
            raise ValueError(f"{name}: the adapter in {source.directory} has no LoRA on it")
        if "magnitude" in source.entries(name):
            raise ValueError(f"{name}: DoRA's update is not s B A, so it cannot be written as a masked adapter")
        if f"{name}.weight" in source.replaced:
            raise ValueError(f"{name}: the adapter also replaces its weight, which a gain does not reach")
        expected = [source.sizes[name].in_features]
        if mask.dtype != torch.bool or list(mask.shape) != expected:
            raise ValueError(f"retained[{name!r}]: expected bool {expected}, got {mask.dtype} {list(mask.shape)}")
        if not gain[name].dtype.is_floating_point or list(gain[name].shape) != expected:
            raise ValueError(
                f"gain[{name!r}]: expected a floating dtype {expected}, got {gain[name].dtype} {list(gain[name].shape)}"
            )
        if not bool(torch.isfinite(gain[name]).all()):
            raise ValueError(f"gain[{name!r}]: holds NaN or Inf")
