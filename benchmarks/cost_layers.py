"""Cost curves of single operations and of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hpa_ext import Gram, HPAConfig, ops
from hpa_ext.costs import Rates, work
from hpa_ext.costs.samples import filled, gram_rates, inverse_diagonal_rates, rows_rates
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.gram_sum import copy_rows, squares_stay_finite
from hpa_ext.hpa.checkpoint.samples import module_work, update_rates
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.plan import plan_update
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate

from .cost_point import Point
from .timing import fastest_ms

_CPU = torch.device("cpu")
_WIDTHS = (512, 1024, 2048, 4096, 8192)
_TOKENS = 2048
_RANK = 64
_RANKS = (4, 8, 16, 32, 64, 128, 256)
_BFLOAT16 = torch.bfloat16


def gram(_: Path) -> Iterator[Point]:
    """`gram_accumulate_` over the width."""
    rates = gram_rates(max(_WIDTHS), _TOKENS, _BFLOAT16, _CPU)
    for width in _WIDTHS:
        x, total = _activations(_TOKENS, width), torch.zeros(width, width)
        predicted = rates.seconds(work.gram_accumulation(_TOKENS, width, 2))
        yield Point(
            "gram", f"gram, {_TOKENS} tokens", "width", width, _seconds(lambda x=x, t=total: _add(t, x)), predicted
        )  # fmt: skip


def inverse_diagonal(_: Path) -> Iterator[Point]:
    """`inverse_diagonal` over the width."""
    rates = inverse_diagonal_rates(max(_WIDTHS), _CPU)
    for width in _WIDTHS:
        matrix = torch.zeros(width, width)
        _add(matrix, _activations(2 * width, width))
        measured = _seconds(lambda m=matrix: ops.inverse_diagonal(m, 0.01, assume_symmetric=True))
        yield Point(
            "inverse_diagonal",
            "inverse diagonal",
            "width",
            width,
            measured,
            rates.seconds(work.inverse_diagonal(width)),
        )


def tokens(_: Path) -> Iterator[Point]:
    """A Gram from nothing to its inverse's diagonal, over the tokens: by the Gram, by the rows, and as `Gram` does."""
    width = 2048
    accumulating = gram_rates(width, _TOKENS, _BFLOAT16, _CPU)
    inverting, from_rows = inverse_diagonal_rates(width, _CPU), rows_rates(width, _BFLOAT16)
    for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 8):
        count = int(share * width)
        x = _activations(count, width)
        by_gram = accumulating.seconds(work.gram_accumulation(count, width, 2))
        by_gram += inverting.seconds(work.inverse_diagonal(width))
        by_rows = from_rows.seconds(work.inverse_diagonal_of_rows(count, width, 2))

        def summed(x: torch.Tensor = x) -> None:
            total = torch.zeros(width, width)
            _add(total, x)
            ops.inverse_diagonal(total, 0.01, assume_symmetric=True)

        series = f"width {width}, by the "
        yield Point("tokens", f"{series}Gram", "tokens", count, _seconds(summed), by_gram)
        if share <= 1:
            measured = _seconds(lambda x=x: _from_rows(x))
            yield Point("tokens", f"{series}rows", "tokens", count, measured, by_rows)
        chosen = by_rows if share <= 0.6 else by_gram
        yield Point(
            "tokens", f"width {width}, as Gram does", "tokens", count,
            _seconds(lambda x=x: Gram(width).update(x).inverse_diagonal()), chosen,
        )  # fmt: skip


def harmonize_widths(_: Path) -> Iterator[Point]:
    """Scoring and merging one square layer over the width, dense and by an adapter."""
    for rank, series in ((None, "layer, dense"), (_RANK, f"layer, rank {_RANK}")):
        rates = _layer_rates(rank)
        for width in _WIDTHS:
            yield _layer_point("harmonize", series, "width", width, width, rank, rates)


def harmonize_ranks(_: Path) -> Iterator[Point]:
    """Scoring and merging a layer of width 4096 over the adapter's rank."""
    rates = _layer_rates(max(_RANKS))
    for rank in _RANKS:
        yield _layer_point("rank", "layer, width 4096", "rank", rank, 4096, rank, rates)


def _layer_rates(rank: int | None) -> Rates:
    return update_rates([(4096, 4096)], rank, _BFLOAT16, _harmonize, merges=True)


def _layer_point(
    phase: str, series: str, variable: str, value: int, width: int, rank: int | None, rates: Rates
) -> Point:
    old = filled((width, width), _BFLOAT16)
    update: WeightUpdate
    if rank is None:
        update = DenseUpdate(old, filled((width, width), _BFLOAT16, shift=11))
    else:
        a, b = filled((rank, width), torch.float32), filled((width, rank), torch.float32, shift=11)
        update = LowRankUpdate(old, a, b, 0.01)
    predicted = rates.seconds(module_work(width, width, 2, rank, merges=True))
    return Point(phase, series, variable, value, _seconds(lambda: _harmonize(update)), predicted)


def _harmonize(update: WeightUpdate) -> None:
    width = update.shape[1]
    diagonal = GramDiagonal(torch.ones(width), torch.zeros(width, dtype=torch.bool), 1, 0.01, 0.01, 32)
    plan = plan_update(update, GramPair(diagonal, diagonal), 0.5, HPAConfig())
    if isinstance(update, LowRankUpdate):
        update.merge(plan.selection, plan.coefficient, "input", out=update.old)
    else:
        plan.merge(update.old, update.new, out=update.new)


def _activations(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).bfloat16()


def _add(total: torch.Tensor, x: torch.Tensor) -> None:
    ops.gram_accumulate_(total, x)


def _from_rows(x: torch.Tensor) -> None:
    """What a `Gram` does that keeps its rows."""
    rows = copy_rows(x, None)
    squares_stay_finite(rows, len(rows))
    ops.inverse_diagonal_of_rows(rows, 0.01)


def _seconds(call: Callable[[], object]) -> float:
    return fastest_ms(lambda _: call(), _CPU, repeats=5) / 1e3
