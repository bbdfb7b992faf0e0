"""Memory that is used again for one tensor after the other: fresh pages cost more time than the reading itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64


class Buffers:
    """A pool of CPU memory for tensors of different sizes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}
        self._others: dict[int, int] = {}  # by address, how many tensors are in it beside the first one
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; to be given back with `release`."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= nbytes]
            smallest = min(fitting, key=lambda i: self._free[i].numel(), default=None)
            buffer = torch.empty(nbytes, dtype=torch.uint8) if smallest is None else self._free.pop(smallest)
            if nbytes:
                self._taken[buffer.data_ptr()] = buffer
        return buffer[:nbytes].view(dtype).view(tuple(shape))

    def release(self, *tensors: Tensor) -> None:
        """Give memory back; nobody may use these tensors, or views of them, any more. Others are looked over."""
        with self._lock:
            for tensor in tensors:
                address = tensor.untyped_storage().data_ptr()
                others = self._others.pop(address, 0)
                if others > 0:
                    self._others[address] = others - 1
                elif (buffer := self._taken.pop(address, None)) is not None:
                    self._free.append(buffer)

    def share(self, tensor: Tensor) -> None:
        """One tensor more is in this tensor's memory, and has to be released too."""
        with self._lock:
            address = tensor.untyped_storage().data_ptr()
            self._others[address] = self._others.get(address, 0) + 1


class Row:
    """Memory of a pool for several tensors, one behind the other; free again when all of them are released.

    In memory of their own, small tensors that are worked on together would leave the pool with pieces that are too
    small for the large ones that come next.

    Args:
        buffers: the pool, which the tensors are released to.
        sizes: bytes of the tensors that are to come.
    """

    def __init__(self, buffers: Buffers, sizes: Iterable[int]) -> None:
        self._buffers = buffers
        self._nbytes = sum(map(_aligned, sizes))
        self._memory: Tensor | None = None  # taken with the first tensor: there may be none
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `Buffers.take`; a tensor beyond the sizes that were told has memory of its own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0 or self._used + _aligned(nbytes) > self._nbytes:
            return self._buffers.take(shape, dtype)
        if self._memory is None:
            self._memory = self._buffers.take([self._nbytes], torch.uint8)
        else:
            self._buffers.share(self._memory)
        start = self._used
        self._used += _aligned(nbytes)
        return self._memory[start : start + nbytes].view(dtype).view(tuple(shape))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
