"""Fingerprints: the same for a copy, another for another model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoint_files import save_sharded, tensors_of

from hpa_ext.checkpoints import (
    CheckpointReader,
    fingerprint,
)
from hpa_ext.checkpoints.fingerprint import WHOLE_BYTES


def test_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    source = save_sharded(tmp_path / "model", tensors_of())
    first = CheckpointReader(source).fingerprint()
    assert len(first) == 64
    os.utime(source / "config.json", (0, 0))
    os.rename(source, tmp_path / "moved")
    assert CheckpointReader(tmp_path / "moved").fingerprint() == first
    for name in sorted(os.listdir(tmp_path / "moved")):
        path = tmp_path / "moved" / name
        before = path.read_bytes()
        changed = bytearray(before)
        if name.endswith(".safetensors"):
            changed[-1] ^= 1  # a bit of a weight
        else:
            changed += b" "
        path.write_bytes(changed)
        counts = name != "tokenizer.json"  # it has no say in the weights
        assert (CheckpointReader(tmp_path / "moved").fingerprint() != first) == counts, name
        path.write_bytes(before)
    assert CheckpointReader(tmp_path / "moved").fingerprint() == first


def test_fingerprint_depends_on_names_and_order(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text("x" if name != "c" else "y")
    prints = {fingerprint([tmp_path / name for name in names]) for names in ("ab", "ba", "a", "b", "c", "abc", "")}
    assert len(prints) == 7
    with pytest.raises(FileNotFoundError):
        fingerprint([tmp_path / "absent"])
    with pytest.raises(IsADirectoryError):
        fingerprint([tmp_path])


def test_fingerprint_of_large_files_samples_them(tmp_path: Path) -> None:
    size = WHOLE_BYTES + (1 << 20) // 2
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    header += b" " * (9000 - len(header))
    with open(path, "wb") as file:  # sparse
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)

    def changed_at(offset: int) -> str:
        with open(path, "r+b") as file:
            file.seek(offset)
            before = file.read(1)
            file.seek(offset)
            file.write(bytes([before[0] ^ 1]))
            file.flush()
            result = fingerprint([path])
            file.seek(offset)
            file.write(before)
        return result

    first = fingerprint([path])
    end = path.stat().st_size
    for offset in (5, 8, 9000, (5 << 20) + 4095, 64 << 20, end - 1, end - 4096):
        assert changed_at(offset) != first, offset
    assert changed_at((5 << 20) + 4096) == first  # as its docstring says
    os.truncate(path, end + 1)
    assert fingerprint([path]) != first
