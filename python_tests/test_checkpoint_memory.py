"""Reading, writing and hashing take the memory of a tensor, not of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import in_a_child, in_memory  # noqa: F401

from hpa_ext.checkpoints import CheckpointReader, ShardedWriter, ShardPlan, fingerprint, verify_checkpoint

_MIB = 1 << 20
_TENSORS, _TENSOR_MIB = 16, 8


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_copying_a_file(tmp_path: Path) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    plan = ShardPlan("model.safetensors", {}, [(f"t{i}", "U8", [_TENSOR_MIB, _MIB]) for i in range(_TENSORS)])

    def copy() -> None:
        with ShardedWriter(tmp_path / "source", [plan]) as writer:
            writer.create()
            writer.mark_written(plan.ranges)
            writer.finish()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _peak_bytes()
        buffer = torch.empty(_TENSOR_MIB, _MIB, dtype=torch.uint8)
        with CheckpointReader(tmp_path / "source") as reader, ShardedWriter(tmp_path / "copy", [plan]) as writer:
            writer.create()
            for name in reader:
                writer.write(name, reader.read(name, out=buffer))
                reader.read(name)
            writer.digest("model.safetensors")
            writer.finish()
        fingerprint([tmp_path / "copy" / "model.safetensors"])
        verify_checkpoint(tmp_path / "copy")
        grown = _peak_bytes() - before
        assert grown < 5 * _TENSOR_MIB * _MIB, f"{grown / _MIB:.0f} MiB"

    assert in_a_child(copy) == 0
