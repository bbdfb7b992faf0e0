"""What this installation is, and which kernel serves which operation on this machine."""

from __future__ import annotations

from typing import Any

import torch

from hpa_ext import _C
from hpa_ext.ops._backend import CUDA_VERIFIED
from hpa_ext.ops.instruction_set import NEVER_RUN

OPERATIONS = (
    "gram",
    "inverse_diagonal",
    "column_scores",
    "column_mask",
    "project_merge",
    "routed_lora",
    "low_rank",
)


def build_info() -> dict[str, Any]:
    """Version, compilers, architectures, instruction sets, and what serves each operation.

    Returns:
        A dictionary of plain values: ``version``, ``compiler``, ``cuda_version`` ("" without CUDA kernels),
        ``cuda_architectures`` (list), ``cuda_devices`` (devices the driver shows), ``torch``, ``instruction_sets``
        (list), ``instruction_set`` (in use), ``unverified_instruction_sets`` (those of the list with a kernel that has
        not run on a processor that has them, used on request only: ``ops.instruction_set``), and ``operations``: for
        each one, what serves CPU and CUDA tensors.
    """
    native = _C.build_info()
    has_cuda = bool(native["cuda_version"])
    instruction_sets = _C.cpu.available_instruction_sets().split(",")
    return {
        "version": native["version"],
        "compiler": native["compiler"],
        "cuda_version": native["cuda_version"],
        "cuda_architectures": native["cuda_architectures"].split(",") if has_cuda else [],
        "cuda_devices": _C.cuda.device_count(),
        "torch": torch.__version__,
        "instruction_sets": instruction_sets,
        "instruction_set": _C.cpu.instruction_set(),
        "unverified_instruction_sets": [name for name in instruction_sets if name in NEVER_RUN],
        "operations": {name: {"cpu": "native", "cuda": _cuda(name, has_cuda)} for name in OPERATIONS},
    }


def _cuda(operation: str, has_cuda: bool) -> str:
    if not has_cuda:
        return "torch (built without CUDA kernels)"
    return "native" if operation in CUDA_VERIFIED else "torch (native kernel not verified on a GPU)"
