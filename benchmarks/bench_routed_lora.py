"""routed_lora: ours against a loop over the experts, alone and for the linears of one input, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row, relative_error, rounding_limit

_RANK = 8
_SCALING = 2.0


def rows(setting: Setting) -> Iterator[Row]:
    """``routed_lora_vs_loop``, and of linears that share their input ``routed_lora_list_vs_...``:

    - ``loop``: a loop over linears and experts, each branch added to its linear's output;
    - ``single``: a call for each linear;
    - ``loop_with_gradients``: forward, and gradients of x, A and B.
    """
    bf16 = torch.bfloat16
    for batch, tokens, width, height, dtype in setting.cases(
        quick=[(2, 12, 64, 48, bf16)],
        default=[(4, 700, 4096, 4096, bf16)],
        full=[(4, 700, 4096, 11008, bf16), (4, 700, 11008, 4096, bf16)],
    ):
        yield _single(_Linears(setting, batch, tokens, width, [height], 8, dtype))
    for batch, tokens, width, heights in setting.cases(
        quick=[(2, 12, 64, [48, 16])],
        default=[(1, 640, 4096, [4096] * 3), (1, 640, 4096, [11008] * 2), (1, 1, 4096, [4096] * 3)],
        full=[(4, 1, 4096, [4096] * 3), (1, 1, 4096, [11008] * 2), (4, 1, 4096, [11008] * 2)],
    ):
        yield from _together(_Linears(setting, batch, tokens, width, heights, 6, bf16))


def expert_loop(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """One expert after the other, in the dtype of x, as LoRA layers apply several adapters."""
    result = torch.zeros(*x.shape[:-1], b.shape[1], dtype=x.dtype, device=x.device)
    for task in range(a.shape[0]):
        gate = (weights[:, task] * scaling[task]).to(x.dtype)
        result += (x @ a[task].mT @ b[task].mT) * gate[:, None, None]
    return result


@dataclass(frozen=True)
class _Linears:
    """Linears of these heights with one input, and what is counted for them."""

    setting: Setting
    batch: int
    tokens: int
    width: int
    heights: list[int]
    tasks: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.tokens, self.width, sum(self.heights), self.tasks, _RANK

    @property
    def operations(self) -> int:
        """Of the forward, multiplications and additions. Gradients of x, A and B: twice as many more at least."""
        return sum(2 * self.batch * self.tokens * self.tasks * _RANK * (self.width + h) for h in self.heights)

    def make(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, list[Tensor], list[Tensor]]:
        """x, A, B, weights, scaling, and the outputs of the base."""
        draw = self.setting.randn
        return (
            draw(self.batch, self.tokens, self.width, dtype=self.dtype),
            [draw(self.tasks, _RANK, self.width, dtype=self.dtype, scale=self.width**-0.5) for _ in self.heights],
            [draw(self.tasks, height, _RANK, dtype=self.dtype, scale=_RANK**-0.5) for height in self.heights],
            torch.softmax(draw(self.batch, self.tasks), -1),
            [torch.full((self.tasks,), _SCALING, device=self.setting.device) for _ in self.heights],
            [draw(self.batch, self.tokens, height, dtype=self.dtype) for height in self.heights],
        )

    def sets(self) -> list[tuple]:
        size = self.batch * self.tokens * (self.width + sum(self.heights)) * self.dtype.itemsize
        return self.setting.sets(size, self.make)

    def row(
        self, metric: str, peer: str, calls: tuple[Callable, Callable], sets: list, check: Check, work: float
    ) -> Row:
        ours, other = calls
        paired = self.setting.pair(lambda i: ours(*sets[i % len(sets)]), lambda i: other(*sets[i % len(sets)]))
        names = "batch, tokens, in, out, tasks, rank"
        counted = self.setting.operations(work, self.dtype)
        return make_row(
            metric,
            names,
            self.shape,
            self.dtype,
            peer,
            paired,
            counted,
            check,
            ops.backend_of("routed_lora", sets[0][0]),
        )


def _single(linears: _Linears) -> Row:
    def ours(x, a, b, weights, scaling, onto):
        return ops.routed_lora(x, a[0], b[0], weights, scaling[0])

    def loop(x, a, b, weights, scaling, onto):
        return expert_loop(x, a[0], b[0], weights, scaling[0])

    sets = linears.sets()
    x, a, b, weights, scaling, _ = sets[0]
    exact = expert_loop(*(value.double() for value in (x, a[0], b[0], weights, scaling[0])))
    check = Check(
        error=relative_error(ours(*sets[0]), exact),
        limit=rounding_limit(linears.dtype),
        peer_error=relative_error(loop(*sets[0]), exact),
    )
    return linears.row("routed_lora_vs_loop", "loop over experts", (ours, loop), sets, check, linears.operations)


def _together(linears: _Linears) -> Iterator[Row]:
    def ours(x, a, b, weights, scaling, onto):
        return ops.routed_lora_list(x, a, b, weights, scaling, onto=onto)

    def singly(x, a, b, weights, scaling, onto):
        return [
            ops.routed_lora_list(x, [a_], [b_], weights, [s_], onto=[to])[0]
            for a_, b_, s_, to in zip(a, b, scaling, onto, strict=True)
        ]

    def loop(x, a, b, weights, scaling, onto):
        each = zip(a, b, scaling, onto, strict=True)
        return [to + expert_loop(x, a_, b_, weights, s_) for a_, b_, s_, to in each]

    sets = linears.sets()
    double = [[t.double() for t in v] if isinstance(v, list) else v.double() for v in sets[0]]
    exact = torch.cat(loop(*double), -1)
    errors = [relative_error(torch.cat(call(*sets[0]), -1), exact) for call in (ours, singly, loop)]
    # The branch is rounded, and its sum with the base's output.
    limit = 2 * rounding_limit(linears.dtype)
    work = linears.operations
    with torch.no_grad():
        for metric, peer, call, error in (
            ("routed_lora_list_vs_loop", "loop over linears and experts", loop, errors[2]),
            ("routed_lora_list_vs_single", "one call for each linear", singly, errors[1]),
        ):
            yield linears.row(metric, peer, (ours, call), sets, Check(errors[0], limit, error), work)
    if linears.tokens > 1:
        yield _with_gradients(linears, loop)


def _with_gradients(linears: _Linears, loop: Callable) -> Row:
    def gradients(call: Callable) -> Callable:
        def run(x, a, b, weights, scaling, onto):
            leaves = [x, *a, *b]
            for leaf in leaves:
                leaf.requires_grad_()
            return torch.autograd.grad(call(x, a, b, weights, scaling, onto), leaves, onto)

        return run

    def ours(x, a, b, weights, scaling, onto):
        return ops.routed_lora_list(x, a, b, weights, scaling, onto=onto)

    sets = linears.sets()
    double = [[t.double() for t in v] if isinstance(v, list) else v.double() for v in sets[0]]
    exact = gradients(loop)(*double)
    errors = [
        max(relative_error(found, of) for found, of in zip(gradients(call)(*sets[0]), exact, strict=True))
        for call in (ours, loop)
    ]
    check = Check(errors[0], rounding_limit(linears.dtype), errors[1])
    return linears.row(
        "routed_lora_list_vs_loop_with_gradients", "loop over linears and experts",
        (gradients(ours), gradients(loop)), sets, check, 3 * linears.operations,
    )  # fmt: skip
