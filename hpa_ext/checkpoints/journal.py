"""What a run has finished, kept so that a later run can go on from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import fsync_path, open_regular, read_exactly, write_fully
from hpa_ext.checkpoints.identity import refuse_difference

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """A file with one line for the run's identity and one for each finished piece of work.

    A line is a CRC-32 of eight hexadecimal digits, a space, and compact JSON; it is on the disk when `append` returns.
    A last line that was torn by a kill or a power cut is dropped. While a journal is open its file is locked, so that
    no two processes on a machine work on one output; the lock ends with the process.

    Attributes:
        path: the file.
        finished: the payload of each finished piece by its key, in the order of the file.

    Use `create` or `resume`; the constructor takes an open, locked descriptor.
    """

    def __init__(self, path: Path, descriptor: int, end: int, finished: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.finished = finished
        self._descriptor = descriptor
        self._end = end
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> Journal:
        """Begin a journal.

        Args:
            path: the file, in a directory that exists.
            identity: whatever decides the result (fingerprints, configuration, versions); plain values for JSON.

        Raises:
            FileExistsError: there is one.
            TypeError, ValueError: the identity holds what JSON cannot.
        """
        path = Path(path)
        line = _line({"identity": identity})
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            return cls._begin(path, descriptor, line)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def resume(cls, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> Journal:
        """Go on with a journal of the same identity.

        A run that was killed before its first line was whole has finished nothing; its journal begins anew.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the identity differs (each differing key, with both values), a line in the midst is
                damaged, or another process has the journal open.
        """
        path = Path(path)
        first = _line({"identity": identity})
        os.close(open_regular(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(descriptor, path)
            records, end = _read(descriptor, path)
            if not records:
                os.ftruncate(descriptor, 0)
                return cls._begin(path, descriptor, first)
            refuse_difference(records[0].get("identity", {}), json.loads(first[9:])["identity"], f"{path}: resume")
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)
            finished = {record["key"]: record["payload"] for record in records[1:]}
            return cls(path, descriptor, end, finished)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _begin(cls, path: Path, descriptor: int, line: bytes) -> Journal:
        write_fully(descriptor, memoryview(line), 0, path, "the first line")
        os.fsync(descriptor)
        fsync_path(path.parent)
        return cls(path, descriptor, len(line), {})

    def append(self, key: str, payload: Mapping[str, Any] | None = None) -> None:
        """Note that a piece of work is finished, and have the note on the disk.

        What the piece wrote elsewhere must be on the disk already (`ShardedWriter.sync`).

        Args:
            key: of the piece; one that is there is replaced.
            payload: plain values for JSON.

        Raises:
            OSError: the disk is full or fails. The journal is as it was.
        """
        line = _line({"key": key, "payload": dict(payload or {})})
        with self._lock:
            if self._descriptor < 0:
                raise ValueError(f"{self.path}: expected an open journal, got a closed one")
            try:
                write_fully(self._descriptor, memoryview(line), self._end, self.path, f"the line of {key!r}")
                os.fdatasync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, self._end)
                raise
            self._end += len(line)
            self.finished[key] = json.loads(line[9:])["payload"]

    def delete(self) -> None:
        """Remove the file; the lock stays until `close`."""
        self.path.unlink()

    def close(self) -> None:
        """Give up the lock."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise type(error)(f"journal: expected plain values for JSON, got {record!r:.200}: {error}") from error
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line, None if the line is damaged."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    text = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _read(descriptor: int, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and where the last whole line ends."""
    contents = bytearray(os.fstat(descriptor).st_size)
    read_exactly(descriptor, memoryview(contents), 0, path, "the journal")
    lines = bytes(contents).splitlines(keepends=True)
    records = [_parse(line) for line in lines]
    whole = next((i for i, record in enumerate(records) if record is None), len(records))
    if any(record is not None for record in records[whole:]):
        raise CheckpointError(
            f"{path}: line {whole + 1} of {len(lines)} is damaged, and whole lines follow it: the file was changed by "
            "something else than an interrupted run"
        )
    return records[:whole], sum(map(len, lines[:whole]))


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(f"{path}: another process is working on this output") from error
        raise OSError(error.errno, f"locking failed: {error.strerror}", str(path)) from error
    # Between opening and locking, its owner may have finished and removed it.
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
        raise CheckpointError(f"{path}: another process has just finished this output")
