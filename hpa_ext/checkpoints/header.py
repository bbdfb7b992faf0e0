"""The header of a safetensors file: an 8-byte little-endian length, then JSON, then the tensors' bytes without gaps.

Everything is checked before it is trusted: a length or an offset from a file is a claim.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hpa_ext.checkpoints.dtypes import BITS, SINCE_THE_BEGINNING, TORCH_DTYPES, elements_per_item
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import mistaken_for, open_regular, parse_json, read_exactly

MOST_HEADER_BYTES = 100_000_000
"""Longer headers are refused, as by safetensors itself."""

_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: its name on disk.
        dtype_tag: the element type as the header has it: "BF16", "F32", "U8" ...
        shape: in elements, as the header has it.
        file: the shard.
        start, stop: its bytes in the file, counted from the file's start.
    """

    name: str
    dtype_tag: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """Torch's dtype.

        Raises:
            CheckpointError: this torch has none; the tensor can still be copied as bytes.
        """
        if self.dtype_tag not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has the type {self.dtype_tag}, for which torch {torch.__version__} "
                "has no dtype"
            )
        return TORCH_DTYPES[self.dtype_tag]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the torch tensor: that of the header, the last dimension halved for F4 (two to an item)."""
        per_item = elements_per_item(self.dtype_tag)
        if per_item == 1:
            return self.shape
        if not self.shape or self.shape[-1] % per_item:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} of type {self.dtype_tag} has the shape {list(self.shape)}; torch "
                "needs an even last dimension"
            )
        return (*self.shape[:-1], self.shape[-1] // per_item)


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Attributes:
        path, file_name: where it lies, and the last part of that.
        size: in bytes.
        metadata: the header's texts.
        entries: its tensors, in the order of their bytes.
        data_start: where the tensors' bytes begin.
    """

    path: Path
    file_name: str
    size: int
    metadata: dict[str, str]
    entries: tuple[TensorEntry, ...]
    data_start: int


def read_header(path: Path) -> tuple[Shard, int]:
    """The checked header of a file, and a descriptor of the file, which the caller closes.

    Raises:
        OSError: the file is absent or cannot be read.
        CheckpointError: it is no complete safetensors file.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        start = bytearray(min(512, size))
        read_exactly(descriptor, memoryview(start), 0, path, "the header")
        if size == 0:
            raise CheckpointError(f"{path}: expected a safetensors file, got an empty file")
        mistaken = mistaken_for(bytes(start))
        if mistaken:
            raise CheckpointError(f"{path}: expected a safetensors file, got {mistaken}")
        if size < 8:
            raise CheckpointError(f"{path}: expected a safetensors file, got {size} bytes: the file is truncated")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MOST_HEADER_BYTES or (size > 8 and start[8:9] != b"{"):
            raise CheckpointError(
                f"{path}: expected a safetensors file, that is, the length of a JSON header and the header; "
                f"got bytes that begin with {bytes(start[:16])!r}"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: expected a header of {length} bytes, found {size - 8}: the file is truncated"
            )
        text = bytearray(length)
        read_exactly(descriptor, memoryview(text), 8, path, "the header")
        shard = parse_header(bytes(text), path, size)
        _confirm(shard)
    except BaseException:
        os.close(descriptor)
        raise
    return shard, descriptor


def parse_header(text: bytes, path: Path, size: int) -> Shard:
    """Check the JSON of a header against the size of its file, in bytes.

    Raises:
        CheckpointError: anything does not fit, by tensor.
    """
    header = parse_json(text, f"{path}: header")
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {_METADATA} in the header: expected texts by name, got {metadata!r:.200}")
    data_start = 8 + len(text)
    entries = [_entry(name, claim, path, data_start) for name, claim in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position, previous = data_start, None
    for entry in entries:
        if entry.start != position:
            fault = "overlaps" if entry.start < position else "leaves a gap after"
            after = f"tensor {previous!r}" if previous is not None else "the header"
            raise CheckpointError(
                f"{path}: tensor {entry.name!r}: expected to start at byte {position}, got {entry.start}: "
                f"it {fault} {after}"
            )
        position, previous = entry.stop, entry.name
    if size < position:
        first = next(entry.name for entry in entries if entry.stop > size)
        raise CheckpointError(
            f"{path}: expected {position} bytes by its header, found {size}: the file is truncated, "
            f"{position - size} bytes are missing, from tensor {first!r} on"
        )
    if size > position:
        raise CheckpointError(
            f"{path}: expected {position} bytes by its header, found {size}: {size - position} bytes too many"
        )
    return Shard(path, path.name, size, dict(metadata), tuple(entries), data_start)


def build_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The bytes before the data, and where each tensor starts in the file, one more for the end.

    The JSON is compact and padded with spaces to a multiple of 8 bytes, as safetensors writes it.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets = [0]
    for name, tag, shape in tensors:
        offsets.append(offsets[-1] + byte_count(tag, shape))
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": offsets[-2:]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [start + offset for offset in offsets]


def byte_count(tag: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor.

    Raises:
        ValueError: the type is unknown, or its elements do not fill whole bytes.
    """
    if tag not in BITS:
        raise ValueError(f"expected a type of safetensors ({', '.join(BITS)}), got {tag!r}")
    bits = BITS[tag] * math.prod(shape)
    if bits % 8:
        raise ValueError(f"expected whole bytes, got {bits} bits")
    return bits // 8


def _entry(name: str, claim: Any, path: Path, data_start: int) -> TensorEntry:
    """One tensor's claim in the header, checked by itself."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in the header, got {claim!r:.200}")
    tag, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(tag, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: expected a type, a shape and two offsets in the header, got {claim!r:.200}")
    try:
        nbytes = byte_count(tag, shape)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: expected {nbytes} bytes for {tag} {shape}, got the offsets {offsets}: "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return TensorEntry(name, tag, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _confirm(shard: Shard) -> None:
    """Let safetensors itself open the file: what it refuses is refused here.

    A type that the installed safetensors may be too old for does not count against the file.
    """
    if not all(entry.dtype_tag in SINCE_THE_BEGINNING for entry in shard.entries):
        return
    try:
        with safe_open(shard.path, framework="numpy") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{shard.path}: safetensors refuses the file: {error}") from error
    if names != {entry.name for entry in shard.entries}:
        raise CheckpointError(f"{shard.path}: safetensors reads other tensor names from the header")
