"""Which instruction set's kernels the CPU operations use: the fastest verified one, unless another is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hpa_ext import _C

NEVER_RUN = ("amx_bf16",)
"""Sets with a kernel that has not run on a processor that has them: used on request only."""

_VARIABLE = "HPA_EXT_INSTRUCTION_SET"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the context, the process's CPU kernels are those of one of ``build_info()["instruction_sets"]``.

    The environment variable HPA_EXT_INSTRUCTION_SET, read at import, sets the one of a process. "amx_bf16" differs from
    the fastest other set in `gram` for bfloat16 alone, and has not run on a processor that has AMX yet.

    Raises:
        RuntimeError: this build or processor lacks it, or the operating system refuses the registers that it needs.
    """
    before = _C.cpu.instruction_set()
    _use(name, "name")
    try:
        yield
    finally:
        _C.cpu.set_instruction_set(before)


def use_environment() -> None:
    """Use the set that the environment asks for: at import, before threads start, as is best for AMX's registers."""
    name = os.environ.get(_VARIABLE)
    if name:
        _use(name, _VARIABLE)


def _use(name: str, argument: str) -> None:
    available = _C.cpu.available_instruction_sets()
    if name not in available.split(","):
        raise RuntimeError(f"{argument}: expected one of {available} on this processor, got {name!r}")
    _C.cpu.set_instruction_set(name)


use_environment()
