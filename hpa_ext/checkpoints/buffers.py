"""Memory that is used again for one tensor after the other: fresh pages cost more time than the reading itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """A pool of CPU memory for tensors of different sizes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}
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
                buffer = self._taken.pop(tensor.untyped_storage().data_ptr(), None)
                if buffer is not None:
                    self._free.append(buffer)
