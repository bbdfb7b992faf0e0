"""Which implementation serves a call: the native kernel, or the reference in plain torch.

Eager calls on plain tensors go straight to the native module (a few microseconds). Calls that are being traced, or made
under a dispatch mode or with a tensor subclass, go through ``torch.ops.hpa_ext`` (registered in _library.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from hpa_ext import _C

DTYPE_TAGS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# A CUDA kernel serves its operation by default once it has passed the tests on a GPU and its measurement lies under
# benchmarks/results/. None has run on a GPU yet.
CUDA_VERIFIED: frozenset[str] = frozenset()

_forced_cuda: ContextVar[bool | None] = ContextVar("hpa_ext_native_cuda", default=None)


@contextmanager
def native_cuda(enabled: bool = True) -> Iterator[None]:
    """Within the context, CUDA tensors are served by the native kernels (or, with False, by torch), verified or not."""
    token = _forced_cuda.set(bool(enabled))
    try:
        yield
    finally:
        _forced_cuda.reset(token)


GRAM_KERNELS = {"mma_sync": 0, "wgmma": 1}
"""The CUDA kernels of gram: for sm_80 and up; for compute capability 9.0 alone (float32, 16-bit rows on 16 bytes)."""

_default_gram_kernel = os.environ.get("HPA_EXT_GRAM_KERNEL", "mma_sync")
_gram_kernel: ContextVar[str] = ContextVar("hpa_ext_gram_kernel", default=_default_gram_kernel)


@contextmanager
def cuda_gram_kernel(name: str) -> Iterator[None]:
    """Within the context, gram's native CUDA calls ask for this kernel: "mma_sync" (the default) or "wgmma".

    "wgmma" has not run on a GPU yet. It splits float32 into three bfloat16, in a workspace of some 64 MB or more, and
    leaves 16-bit rows that do not begin on 16-byte boundaries to "mma_sync"; on a device that is not of compute
    capability 9.0 a call raises RuntimeError. The environment variable HPA_EXT_GRAM_KERNEL sets the default of a
    process.
    """
    if name not in GRAM_KERNELS:
        raise ValueError(f"name: expected one of {', '.join(GRAM_KERNELS)}, got {name!r}")
    token = _gram_kernel.set(name)
    try:
        yield
    finally:
        _gram_kernel.reset(token)


def gram_kernel() -> int:
    """The number of the kernel asked for, as the native module wants it."""
    name = _gram_kernel.get()
    if name not in GRAM_KERNELS:
        raise ValueError(f"HPA_EXT_GRAM_KERNEL: expected one of {', '.join(GRAM_KERNELS)}, got {name!r}")
    return GRAM_KERNELS[name]


def backend_of(operation: str, tensor: Tensor) -> str:
    """What serves `operation` for tensors of this device and dtype: "native" or "torch"."""
    if tensor.dtype not in DTYPE_TAGS:
        return "torch"
    kind = tensor.device.type
    if kind == "cpu":
        return "native"
    if kind == "cuda" and torch.version.cuda is not None and _C.build_info()["cuda_version"]:
        forced = _forced_cuda.get()
        if forced or (forced is None and operation in CUDA_VERIFIED and _kernels_run(tensor.device.index)):
            return "native"
    return "torch"


@cache
def _kernels_run(index: int) -> bool:
    """Whether the driver is new enough for this build's CUDA runtime, and the device for its kernels (sm_80 and up)."""
    return _C.cuda.device_count() > 0 and torch.cuda.get_device_capability(index) >= (8, 0)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether the call must go through the dispatcher: compilation, fake tensors, modes and subclasses."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    # What is no tensor at all is left to the checks, which say so.
    return any(isinstance(t, Tensor) and type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors)


def use_torch_threads() -> None:
    """Share torch's thread setting with the native kernels."""
    _C.cpu.set_thread_count(torch.get_num_threads())


def mark_written(tensor: Tensor) -> None:
    """Tell autograd that a kernel wrote to the tensor, so that a graph that still needs the old values refuses."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are the ones to call."""
    return tensor.is_cuda


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Within the context the tensor's device is the current one: a kernel is launched on that, whatever its stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def stream_of(tensor: Tensor) -> int:
    """The address of torch's current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def workspace(size: int, tensor: Tensor) -> Tensor:
    """Device memory for a kernel, from torch's allocator and hence ordered on the current stream."""
    return torch.empty(max(size, 1), dtype=torch.uint8, device=tensor.device)


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix itself if its columns are adjacent and its rows do not overlap, else a contiguous copy."""
    rows, columns = matrix.shape
    adjacent = columns <= 1 or matrix.stride(1) == 1
    apart = rows <= 1 or matrix.stride(0) >= columns
    return matrix if adjacent and apart else matrix.contiguous()


def row_stride(matrix: Tensor) -> int:
    """Elements between rows, with the meaningless strides of a single row made regular."""
    return max(matrix.stride(0), matrix.shape[1], 1) if matrix.shape[0] > 1 else max(matrix.shape[1], 1)
