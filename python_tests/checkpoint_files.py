"""Checkpoints for tests: small ones as they should be, and files made wrong on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hpa_ext.checkpoints import ShardPlan, index_of
from hpa_ext.checkpoints.dtypes import dtype_tag


def tensors_of(layers: int = 3, width: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a small decoder in bfloat16 by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(4 * width, width)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = normal(3 * width, width)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = normal(width, 3 * width)
        tensors[f"model.layers.{layer}.norm.weight"] = normal(width)
    return tensors


def save_sharded(directory: Path, tensors: Mapping[str, Tensor], shards: int = 2) -> Path:
    """Save as transformers does: shards, an index, a configuration and a tokenizer file."""
    directory.mkdir(exist_ok=True)
    names = list(tensors)
    plans = []
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file_name, {"format": "pt"})
        plans.append(ShardPlan(file_name, {}, [(name, dtype_tag(t.dtype), t.shape) for name, t in part.items()]))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_of(plans)))
    write_side_files(directory)
    return directory


def save_single(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Save as one file with its side files."""
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    write_side_files(directory)
    return directory


def write_side_files(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes | int = b"", pad: bool = True) -> Path:
    """A safetensors file with whatever header; `data` as bytes, or how many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + (bytes(data) if isinstance(data, int) else data))
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """A tensor's claim in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(name="tmp_path")
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """Where it is possible, a temporary directory in memory: hundreds of fsyncs would take minutes on a busy disk.

    To be imported where it should replace pytest's; what a kill leaves behind does not depend on the disk.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a forked process; its exit code, 1 if it raised, or the negative number of its signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the pool of threads has stayed in the parent
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
