"""Whether files are the same as before, without reading all of them."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from hpa_ext.checkpoints.files import open_regular, read_exactly

WHOLE_BYTES = 64 << 20
"""Smaller files are read whole."""

_STEP_BYTES = 1 << 20
_SAMPLE_BYTES = 4 << 10
_MOST_HEADER_BYTES = 100_000_000


def fingerprint(paths: Iterable[str | os.PathLike[str]]) -> str:
    """SHA-256 over the names, sizes and contents of files, in the order given; 64 hexadecimal digits.

    Files below `WHOLE_BYTES` count whole. Of larger ones count the header, if they are safetensors, the first 4 KiB of
    every MiB, and the last 4 KiB: 0.4 % of the file. Neither directories nor times count, so a copy that was moved
    has the same fingerprint.

    It tells apart models, steps of training, quantizations and truncated copies: training changes every part of a
    tensor. It misses a change that stays between the samples of a large file, such as a few flipped bits or a tensor
    of less than 1 MiB edited by hand; for those there are the hashes of whole files in the manifest of an output.

    Raises:
        OSError: a file is absent or cannot be read.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        name = os.fsencode(path.name)
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            digest.update(struct.pack("<QQ", len(name), size) + name)
            for start, stop in _ranges(descriptor, path, size):
                buffer = bytearray(stop - start)
                read_exactly(descriptor, memoryview(buffer), start, path, "the file")
                digest.update(buffer)
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def _ranges(descriptor: int, path: Path, size: int) -> Iterable[tuple[int, int]]:
    """Ranges of bytes of a file that count."""
    if size < WHOLE_BYTES:
        yield from ((start, min(start + _STEP_BYTES, size)) for start in range(0, size, _STEP_BYTES))
        return
    if path.suffix == ".safetensors":
        length = bytearray(8)
        read_exactly(descriptor, memoryview(length), 0, path, "the length of the header")
        stop = min(8 + min(*struct.unpack("<Q", length), _MOST_HEADER_BYTES), size)
        yield from ((start, min(start + _STEP_BYTES, stop)) for start in range(0, stop, _STEP_BYTES))
    os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_RANDOM)  # no reading ahead between the samples
    for start in range(0, size, _STEP_BYTES):
        yield start, min(start + _SAMPLE_BYTES, size)
    yield size - _SAMPLE_BYTES, size
