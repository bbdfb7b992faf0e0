"""Safetensors files on their way: under the name ``<file>.partial``, headers in place, room reserved."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import PARTIAL, fsync_path, open_regular, read_exactly, write_fully
from hpa_ext.checkpoints.room import require_room, reserve
from hpa_ext.checkpoints.shard_plan import ShardPlan


class PartialFiles:
    """The files of some plans while they are being written. Safe to use from several threads.

    Args:
        directory: where they lie.
        plans: one for each, of different file names.
    """

    def __init__(self, directory: Path, plans: Sequence[ShardPlan]) -> None:
        self._directory = directory
        self._plans = {plan.file_name: plan for plan in plans}
        self._descriptors: dict[str, int] = {}
        self._touched: set[str] = set()
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def create(self, *, replace: bool, reserve_bytes: int) -> None:
        """Make the files; raises as `ShardedWriter.create`, and then leaves none of them."""
        self._require_closed()
        present = [path for name in self._plans for path in (self._partial(name), self._final(name))]
        present = [path for path in present if os.path.lexists(path)]
        if present and not replace:
            raise FileExistsError(errno.EEXIST, "expected no such file before writing", str(present[0]))
        for path in present:
            path.unlink()
        needed = sum(plan.size for plan in self._plans.values()) + reserve_bytes
        require_room(self._directory, needed, f"{len(self._plans)} files")
        try:
            for name, plan in self._plans.items():
                path = self._partial(name)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptors[name] = descriptor = os.open(path, flags, 0o666)
                reserve(descriptor, plan.size, path)
                write_fully(descriptor, memoryview(plan.header), 0, path, "the header")
                os.fsync(descriptor)
            fsync_path(self._directory)
        except BaseException:
            made = list(self._descriptors)  # not those of another process that was a moment earlier
            self.close()
            for name in made:
                self._partial(name).unlink(missing_ok=True)
            raise

    def open(self) -> None:
        """Open files that are there; raises as `ShardedWriter.open`."""
        self._require_closed()
        try:
            for name, plan in self._plans.items():
                path = self.path(name)
                os.close(open_regular(path))
                self._descriptors[name] = descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                _check_same(descriptor, plan, path)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, data: memoryview, offset: int, what: str) -> None:
        """Write bytes of the file `name`; `what` they are is said in errors."""
        write_fully(self.descriptor(name), data, offset, self.path(name), what)
        with self._lock:
            self._touched.add(name)

    def sync(self, names: Collection[str] | None) -> None:
        """Have on the disk what has been written, to all files or to these."""
        with self._lock:
            touched = [name for name in self._touched if names is None or name in names]
            self._touched.difference_update(touched)
        for name in touched:
            try:
                os.fdatasync(self.descriptor(name))
            except BaseException:
                with self._lock:
                    self._touched.add(name)
                raise

    def rename(self) -> None:
        """Have everything on the disk, and give the files their names; goes on where an earlier run was stopped."""
        for name in self._plans:
            os.fsync(self.descriptor(name))
        for name in self._plans:
            if self._partial(name).exists():
                os.rename(self._partial(name), self._final(name))
        fsync_path(self._directory)

    def remove(self) -> None:
        """Close the files and remove those that are unfinished."""
        self.close()
        for name in self._plans:
            self._partial(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and leave them as they are."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def descriptor(self, name: str) -> int:
        """The open file, for reading and writing."""
        if name not in self._descriptors:
            raise ValueError(f"{name}: expected an open writer, got one before create() or open(), or after close()")
        return self._descriptors[name]

    def path(self, name: str) -> Path:
        """The file under the name that it has now; a run that was stopped while renaming has left some renamed."""
        partial, final = self._partial(name), self._final(name)
        return final if final.exists() and not partial.exists() else partial

    def _partial(self, name: str) -> Path:
        return self._directory / (name + PARTIAL)

    def _final(self, name: str) -> Path:
        return self._directory / name

    def _require_closed(self) -> None:
        if self._descriptors:
            raise ValueError("writer: expected one that is not open yet, got an open one")


def _check_same(descriptor: int, plan: ShardPlan, path: Path) -> None:
    """Size and header are those of the plan."""
    size = os.fstat(descriptor).st_size
    if size != plan.size:
        raise CheckpointError(f"{path}: expected {plan.size} bytes, found {size}: not the file that was begun")
    header = bytearray(len(plan.header))
    read_exactly(descriptor, memoryview(header), 0, path, "the header")
    if bytes(header) != plan.header:
        raise CheckpointError(f"{path}: expected the header of the planned file, found another")
