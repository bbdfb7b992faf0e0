"""routed_lora: ours against a loop over the experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row, relative_error, rounding_limit

_TASKS = 8
_RANK = 8
_SCALING = 2.0


def expert_loop(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """One expert after the other, in the dtype of x, as LoRA layers apply several adapters."""
    result = torch.zeros(*x.shape[:-1], b.shape[1], dtype=x.dtype, device=x.device)
    for task in range(a.shape[0]):
        gate = (weights[:, task] * scaling[task]).to(x.dtype)
        result += (x @ a[task].mT @ b[task].mT) * gate[:, None, None]
    return result


def rows(setting: Setting) -> Iterator[Row]:
    """``routed_lora_vs_loop``: a batch of samples of LLaVA's length, eight experts of rank eight."""
    bf16 = torch.bfloat16
    for batch, tokens, width, height, dtype in setting.cases(
        quick=[(2, 12, 64, 48, bf16)],
        default=[(4, 700, 4096, 4096, bf16)],
        full=[(4, 700, 4096, 11008, bf16), (4, 700, 11008, 4096, bf16)],
    ):
        yield _case(setting, batch, tokens, width, height, dtype)


def _case(setting: Setting, batch: int, tokens: int, width: int, height: int, dtype: torch.dtype) -> Row:
    def make() -> tuple[Tensor, ...]:
        return (
            setting.randn(batch, tokens, width, dtype=dtype),
            setting.randn(_TASKS, _RANK, width, dtype=dtype, scale=width**-0.5),
            setting.randn(_TASKS, height, _RANK, dtype=dtype, scale=_RANK**-0.5),
            torch.softmax(setting.randn(batch, _TASKS), -1),
            torch.full((_TASKS,), _SCALING, device=setting.device),
        )

    sets = setting.sets(batch * tokens * width * dtype.itemsize, make)
    exact = expert_loop(*(value.double() for value in sets[0]))
    check = Check(
        error=relative_error(ops.routed_lora(*sets[0]), exact),
        limit=rounding_limit(dtype),
        peer_error=relative_error(expert_loop(*sets[0]), exact),
    )
    paired = setting.pair(
        lambda index: ops.routed_lora(*sets[index % len(sets)]), lambda index: expert_loop(*sets[index % len(sets)])
    )
    work = setting.operations(2 * batch * tokens * _TASKS * _RANK * (width + height), dtype)
    return make_row(
        "routed_lora_vs_loop", "batch, tokens, in, out, tasks, rank", (batch, tokens, width, height, _TASKS, _RANK),
        dtype, "loop over experts", paired, work, check, ops.backend_of("routed_lora", sets[0][0]),
    )  # fmt: skip
