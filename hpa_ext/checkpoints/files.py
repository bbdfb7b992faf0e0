"""Reading and writing files to the last byte, with errors that name the file."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.errors import CheckpointError

# A read or write of this size is long enough for full bandwidth, and short enough for Ctrl-C to take effect soon.
_PIECE_BYTES = 64 << 20

PARTIAL = ".partial"
"""What the name of an unfinished file or directory ends in."""

_MOST_JSON_BYTES = 512 << 20


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; symlinks are followed.

    Raises:
        IsADirectoryError, FileNotFoundError, PermissionError, OSError: as the system says.
        CheckpointError: the path is a pipe, a socket or a device.
    """
    # Without O_NONBLOCK opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a directory", str(path))
    raise CheckpointError(f"{path}: expected a regular file, got a pipe, socket or device")


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: Path, what: str) -> None:
    """Fill the buffer from the file at `offset`; `what` names the contents in errors.

    Raises:
        CheckpointError: the file ends before.
        OSError: reading failed; with the file's name, which the system leaves out.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + _PIECE_BYTES]], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"reading {what} failed: {error.strerror}", str(path)) from error
        if count == 0:
            raise CheckpointError(
                f"{path}: expected {what} at bytes {offset} to {offset + len(buffer)}, the file ends at "
                f"{offset + done}: it was cut short after it was opened"
            )
        done += count


def write_fully(descriptor: int, buffer: memoryview, offset: int, path: Path, what: str) -> None:
    """Write the whole buffer at `offset`; `what` names the contents in errors.

    Raises:
        OSError: writing failed; with the file's name, and how much room there is if that was the cause.
    """
    done = 0
    while done < len(buffer):
        try:
            done += os.pwrite(descriptor, buffer[done : done + _PIECE_BYTES], offset + done)
        except OSError as error:
            message = f"writing {what} failed: {error.strerror}"
            if error.errno in NO_ROOM:
                message += f"; {len(buffer) - done} bytes to go, {free_bytes(path)} bytes free on this filesystem"
            raise OSError(error.errno, message, str(path)) from error


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that mean that the bytes do not fit: a full disk, a quota, the largest file that is allowed."""


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write to the filesystem of an existing file or directory, bytes."""
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def byte_view(data: memoryview | bytes | bytearray) -> memoryview:
    """The bytes of a contiguous buffer of any element type."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; valid as long as the tensor's storage is."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def fsync_path(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems keep names safe by themselves and refuse to sync a directory.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise OSError(error.errno, f"syncing failed: {error.strerror}", str(path)) from error
    finally:
        os.close(descriptor)


def write_atomically(path: Path, contents: bytes) -> None:
    """Write a small file so that it is either absent (or as it was) or complete, and on the disk."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file is absent or cannot be read.
        CheckpointError: it is no JSON object, or names a key twice.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{path}: expected JSON of at most {_MOST_JSON_BYTES} bytes, got {size}")
        contents = bytearray(size)
        read_exactly(descriptor, memoryview(contents), 0, path, "JSON")
    finally:
        os.close(descriptor)
    return parse_json(bytes(contents), str(path))


def parse_json(contents: bytes, where: str) -> dict[str, Any]:
    """The object in JSON text, UTF-8.

    Raises:
        CheckpointError: it is no JSON object, or names a key twice; `where` comes first in the message.
    """
    mistaken = mistaken_for(contents[:512])
    if mistaken:
        raise CheckpointError(f"{where}: expected JSON, got {mistaken}")
    try:
        value = json.loads(contents.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected JSON, got text that does not parse: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def mistaken_for(start: bytes) -> str | None:
    """What a file that begins with these bytes is, if it is something that often lies where a model should."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page; the download did not give the file"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, such as torch.save writes (pickle), which is not read"
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05" and len(start) > 2 and start[8:9] != b"{":
        return "a pickle, which is not read"
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that comes twice would hide one of its values."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} comes twice")
    return result
