"""Room on the disk, found out before the work instead of in the midst of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hpa_ext.checkpoints.files import NO_ROOM, free_bytes

# What filesystems say that cannot reserve.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def require_room(directory: Path, needed: int, what: str) -> None:
    """Refuse if the filesystem of an existing directory has less than `needed` bytes for `what`.

    Raises:
        OSError: ``ENOSPC``, with both numbers.
    """
    free = free_bytes(directory)
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"too little room for {what}: {needed} bytes needed, {free} bytes free", str(directory)
        )


def reserve(descriptor: int, size: int, path: Path) -> None:
    """Give an empty open file `size` bytes, reserved on the disk where the filesystem can do that.

    Raises:
        OSError: they do not fit (a full disk, a quota, the largest file allowed); with what is needed and free.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            os.ftruncate(descriptor, size)
        elif error.errno in NO_ROOM:
            message = f"too little room: {error.strerror}; {size} bytes needed, {free_bytes(path)} bytes free"
            raise OSError(error.errno, message, str(path)) from error
        else:
            raise OSError(error.errno, f"reserving {size} bytes failed: {error.strerror}", str(path)) from error
