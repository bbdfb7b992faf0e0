"""Rates of a disk and of hashing, from short samples that leave nothing behind."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from hpa_ext.costs.pipeline import Stage

_SAMPLE_BYTES = 64 << 20
_HASH_BYTES = 16 << 20
_GUESSED = 0.5e9


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second, and seconds.

    Attributes:
        copy: into the system's cache.
        sync: from there to the disk.
        hash: SHA-256.
        sync_seconds: to have a line at the end of a file on the disk.
    """

    copy: float
    sync: float
    hash: float
    sync_seconds: float

    def written(self, nbytes: float) -> Stage:
        """Handing bytes to the system, which takes a core."""
        return Stage(nbytes / self.copy, nbytes / self.copy)

    def kept(self, nbytes: float, syncs: int) -> Stage:
        """Waiting for the disk, then reading back and hashing: one after the other."""
        hashed = nbytes * (1 / self.hash + 1 / self.copy)
        return Stage(nbytes / self.sync + syncs * self.sync_seconds + hashed, hashed)


def measure_disk(directory: Path) -> DiskRates:
    """Measure on the filesystem of an existing directory, with a file without a name; 64 MiB are written.

    Where there are no such files, 0.5 GB/s are taken for the disk, and 0.01 s for a sync.
    """
    buffer = memoryview(bytearray(_SAMPLE_BYTES))
    start = time.perf_counter()
    hashlib.sha256(buffer[:_HASH_BYTES])
    hashing = _HASH_BYTES / (time.perf_counter() - start)
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return DiskRates(4 * _GUESSED, _GUESSED, hashing, 0.01)
    try:
        start = time.perf_counter()
        written = os.pwrite(descriptor, buffer, 0)
        copied = time.perf_counter()
        os.fdatasync(descriptor)
        synced = time.perf_counter()
        latencies = []
        for line in range(5):  # a file that grows, as a journal does
            before = time.perf_counter()
            os.pwrite(descriptor, b"x" * 512, written + 512 * line)
            os.fdatasync(descriptor)
            latencies.append(time.perf_counter() - before)
        return DiskRates(
            written / (copied - start), written / max(synced - copied, 1e-9), hashing, sorted(latencies)[2]
        )  # fmt: skip
    except OSError:
        return DiskRates(4 * _GUESSED, _GUESSED, hashing, 0.01)
    finally:
        os.close(descriptor)
