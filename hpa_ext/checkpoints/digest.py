"""SHA-256 of files, with a buffer of fixed size; hashing and reading let other threads run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from hpa_ext.checkpoints.files import open_regular, read_exactly

_BUFFER_BYTES = 4 << 20


class RunningDigest:
    """SHA-256 of a file that is being written from its start to its end, fed while the bytes are still in the cache.

    Args:
        descriptor: the open file, readable; not closed.
        path: its name in errors.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._hash = hashlib.sha256()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.position = 0

    def advance(self, stop: int, progress: Callable[[int], None] | None = None) -> None:
        """Take in the bytes up to `stop`; nothing if it has gone that far. `progress` is told each piece's bytes."""
        while self.position < stop:
            piece = self._buffer[: stop - self.position]
            read_exactly(self._descriptor, piece, self.position, self._path, "the file")
            self._hash.update(piece)
            self.position += len(piece)
            if progress is not None:
                progress(len(piece))

    def hexdigest(self) -> str:
        """Of the bytes so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def sha256_of(descriptor: int, size: int, path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the first `size` bytes of an open file, 64 hexadecimal digits."""
    digest = RunningDigest(descriptor, path)
    digest.advance(size, progress)
    return digest.hexdigest()


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
    """SHA-256 of a file, 64 hexadecimal digits, and its size in bytes.

    Raises:
        OSError: it is absent or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        return sha256_of(descriptor, size, path, progress), size
    finally:
        os.close(descriptor)
