"""Rates of the library's operations, measured at several sizes within a fraction of a second each."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hpa_ext import ops
from hpa_ext.costs import work
from hpa_ext.costs.rates import Rates
from hpa_ext.costs.work import Work
from hpa_ext.gram import Gram
from hpa_ext.ops.cholesky import cholesky

# Small enough for the overhead of a call, the others for the quadratic and the cubic part.
_WIDTHS = (64, 512, 1536)
_WIDEST = 4096
_BUDGET_S = 0.4  # for the widest sample, with what it is made from

Sample = tuple[Work, float]


def shortest_seconds(call: Callable[[], object], repeats: int = 3, enough: float = 0.15) -> float:
    """The shortest time of one call: of `repeats` and as many more as take 30 ms together, at most 30; of fewer once
    they have taken `enough` seconds together. Noise only ever adds.
    """
    times: list[float] = []
    while sum(times) < enough and (len(times) < repeats or (sum(times) < 0.03 and len(times) < 30)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def fitted(measure: Callable[[int], Sample], widest: int) -> Rates:
    """Rates from ``measure(width)`` at three small widths, and at one near `widest` if that takes little time.

    The last one is the widest up to 4096 whose time the others predict to be below 0.4 s.
    """
    measure(_WIDTHS[0])  # loads what is loaded at the first call
    samples = [measure(width) for width in _WIDTHS]
    work_done, seconds = samples[-1]
    affordable = int(_WIDTHS[-1] * (_BUDGET_S / 3 / seconds) ** (1 / 3))
    last = min(widest, _WIDEST, affordable) // 64 * 64
    if work_done.operations and last >= 1.25 * _WIDTHS[-1]:
        samples.append(measure(last))
    return Rates.fit(samples)


def forward_rates(widest: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """Of `work.forward` for calls of so many tokens, from one linear layer."""

    def measure(width: int) -> Sample:
        x = torch.ones(tokens, width, dtype=dtype, device=device)
        weight = torch.ones(width, width, dtype=dtype, device=device)
        seconds = shortest_seconds(lambda: _waited(torch.nn.functional.linear(x, weight)))
        return work.forward(width**2, tokens, x.element_size()), seconds

    return fitted(measure, widest)


def gram_rates(widest: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """Of `work.gram_accumulation` for calls of so many tokens."""

    def measure(width: int) -> Sample:
        x = torch.ones(tokens, width, dtype=dtype, device=device)
        total = torch.zeros(width, width, device=device)
        counted = work.gram_accumulation(tokens, width, x.element_size())
        return counted, shortest_seconds(lambda: _waited(ops.gram_accumulate_(total, x)))

    return fitted(measure, widest)


def inverse_diagonal_rates(widest: int, device: torch.device) -> Rates:
    """Of `work.inverse_diagonal`."""

    def measure(width: int) -> Sample:
        matrix = torch.eye(width, device=device)
        call = shortest_seconds(lambda: ops.inverse_diagonal(matrix, 0.01, assume_symmetric=True))
        return work.inverse_diagonal(width), call

    return fitted(measure, widest)


def rows_rates(widest: int, dtype: torch.dtype) -> Rates:
    """Of `work.inverse_diagonal_of_rows` and the copy of the rows before it, at a quarter as many tokens as features;
    on the CPU, where a `Gram` does so.
    """

    def measure(width: int) -> Sample:
        tokens = width // 4
        rows = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        seconds = shortest_seconds(lambda: Gram(width).update(rows).inverse_diagonal(0.01))
        return work.inverse_diagonal_of_rows(tokens, width, rows.element_size()), seconds

    return fitted(measure, widest)


def cholesky_rates(widest: int, summed: int, device: torch.device) -> Rates:
    """Of `work.cholesky` with the sum of so many matrices before it."""

    def measure(width: int) -> Sample:
        one = torch.eye(width, device=device)
        diagonal = torch.full((width,), float(summed), dtype=torch.float64, device=device)

        def call() -> None:
            total = torch.add(one, one, alpha=0.5)
            for _ in range(summed - 2):
                total.add_(one)
            cholesky(total, diagonal)

        return work.cholesky(width, summed), shortest_seconds(call)

    return fitted(measure, widest)


def solve_rates(widest: int, count: int, device: torch.device) -> Rates:
    """Of `work.solve_rows` with so many rows."""

    def measure(width: int) -> Sample:
        matrix = torch.eye(width, device=device)
        factor = cholesky(matrix, matrix.diagonal().double())
        rows = torch.ones(count, width, device=device)
        return work.solve_rows(count, width), shortest_seconds(lambda: _waited(factor.solve_rows(rows)))

    return fitted(measure, widest)


def product_rates(widest: int, count: int, device: torch.device) -> Rates:
    """Of `work.product` with so many rows."""

    def measure(width: int) -> Sample:
        matrix, rows = torch.eye(width, device=device), torch.ones(count, width, device=device)
        return work.product(count, width), shortest_seconds(lambda: _waited(rows @ matrix))

    return fitted(measure, widest)


def energy_rates(count: int, device: torch.device) -> Rates:
    """Of `work.energy` with so many rows."""

    def measure(width: int) -> Sample:
        rows = torch.ones(count, width, device=device)
        return work.energy(count, width), shortest_seconds(lambda: _waited(rows.double() @ rows.double().mT))

    return fitted(measure, _WIDTHS[-1])


def filled(shape: tuple[int, int], dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    """Random numbers, drawn once and repeated: millions of them would take longer than what is measured."""
    count = shape[0] * shape[1]
    block = torch.randn(min(count, 1 << 16) + shift, generator=torch.Generator().manual_seed(shift)).mul_(0.02)
    block = block[shift:].to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def _waited(result: torch.Tensor) -> None:
    """Wait for a device: what is timed is the work, not its enqueuing."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
