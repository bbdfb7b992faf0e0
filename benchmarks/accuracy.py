"""Largest error of each operation against float64, by dtype, beside torch's; and what a call costs at 8 x 8.

``python -m hpa_ext.benchmarks.accuracy`` prints both tables. Random data of a fixed seed, on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpa_ext import ops, reference
from hpa_ext.reporting.table import format_table

from .rows import relative_error

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CALLS = 500


def errors() -> Iterator[tuple[str, str, float, float]]:
    """``(operation, dtype, our error, torch's in the same dtype)``, each relative in the Frobenius norm."""
    torch.manual_seed(0)
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        for operation, ours, peer, exact in _cases(dtype):
            yield operation, name, relative_error(ours, exact), relative_error(peer, exact)
    for label, tokens in (("4096 tokens", 4096), ("100 tokens", 100)):
        x = torch.randn(tokens, 1024)
        h = 2 / tokens * x.T @ x
        damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(1024, dtype=torch.float64)
        peer = torch.cholesky_inverse(torch.linalg.cholesky(damped.float())).diagonal()
        exact = torch.linalg.inv(damped).diagonal()
        ours = ops.inverse_diagonal(h, 0.01)
        yield f"inverse_diagonal, {label}", "float32", relative_error(ours, exact), relative_error(peer, exact)


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Our result, torch's in the same dtype and the one in float64, of the operations that take weights of `dtype`."""
    x = torch.randn(2048, 1024).to(dtype)
    grams = [torch.zeros(1024, 1024) for _ in range(2)]
    reference.gram_accumulate_(grams[1], x)
    yield "gram", ops.gram_accumulate_(grams[0], x), grams[1], x.double().T @ x.double()

    old = torch.randn(1024, 1000).to(dtype)
    new = (1.01 * old.float() + 0.05 * torch.randn(1024, 1000)).to(dtype)
    sums = zip(ops.column_scores(old, new), reference.column_scores(old, new), _exact_sums(old, new), strict=True)
    for part, (ours, peer, exact) in zip(("squared update", "inner product", "old norm"), sums, strict=True):
        yield f"column_scores, {part}", ours, peer, exact

    mask, coefficient = torch.rand(1000) > 0.9, torch.tensor(0.013)
    merged = [merge(old, new, mask, coefficient) for merge in (ops.project_merge, reference.project_merge)]
    exact = reference.project_merge(old.double(), new.double(), mask, coefficient.double())
    yield "project_merge", merged[0], merged[1], exact

    x, a, b = torch.randn(2, 64, 512).to(dtype), torch.randn(6, 8, 512).to(dtype), torch.randn(6, 512, 8).to(dtype)
    weights, scaling = torch.rand(2, 6), torch.ones(6)
    loop = sum(weights[:, task, None, None].to(dtype) * (x @ a[task].T @ b[task].T) for task in range(6))
    exact = reference.routed_lora(*(value.double() for value in (x, a, b, weights, scaling)))
    yield "routed_lora", ops.routed_lora(x, a, b, weights, scaling), loop, exact


def _exact_sums(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.column_scores(old.double(), new.double())


def overheads() -> Iterator[tuple[str, float]]:
    """``(operation, microseconds)``: the median eager call on matrices of 8 x 8, where nothing but the call counts."""
    torch.manual_seed(0)
    weight, gram, scores, count = torch.randn(8, 8), torch.eye(8), torch.rand(8), torch.tensor(3)
    mask, coefficient, out = torch.rand(8) > 0.5, torch.tensor(0.1), torch.empty(8, 8)
    expert = torch.randn(1, 1, 8), torch.randn(1, 2, 8), torch.randn(1, 8, 2), torch.rand(1, 1), torch.ones(1)
    calls: dict[str, Callable[[], object]] = {
        "gram_accumulate_": lambda: ops.gram_accumulate_(gram, weight),
        "inverse_diagonal": lambda: ops.inverse_diagonal(gram),
        "inverse_diagonal, check=False": lambda: ops.inverse_diagonal(gram, check=False),
        "column_scores": lambda: ops.column_scores(weight, weight),
        "column_mask": lambda: ops.column_mask(scores, count),
        "project_merge": lambda: ops.project_merge(weight, weight, mask, coefficient, out),
        "routed_lora": lambda: ops.routed_lora(*expert),
        "torch: weight + weight": lambda: weight + weight,
    }
    for name, call in calls.items():
        yield name, _median_microseconds(call)


def _median_microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return sorted(times)[_CALLS // 2] / 1e3


def main() -> None:
    """Print both tables."""
    rows = [(operation, dtype, f"{ours:.1e}", f"{peer:.1e}") for operation, dtype, ours, peer in errors()]
    print(format_table(("operation", "dtype", "error against float64", "torch's"), rows))
    print()
    print(format_table(("call at 8 x 8", "microseconds"), [(name, f"{time_:.1f}") for name, time_ in overheads()]))


if __name__ == "__main__":
    main()
