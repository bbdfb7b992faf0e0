"""Cost curves of single operations and of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hpa_ext import Gram, HPAConfig, calibrate, ops
from hpa_ext.costs import Rates, Work, work
from hpa_ext.costs.samples import forward_rates, gram_rates, inverse_diagonal_rates, rows_rates
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.gram_sum import copy_rows, squares_stay_finite
from hpa_ext.hpa.checkpoint.samples import filled_update, module_work, update_rates
from hpa_ext.hpa.layer_plan import merge_updates
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.plan import plan_update
from hpa_ext.hpa.update import WeightUpdate

from .cost_inputs import VOCABULARY, inner_width, linears
from .cost_point import Point
from .timing import fastest_ms

_CPU = torch.device("cpu")
_WIDTHS = (512, 1024, 2048, 4096, 8192)
_TOKENS = 2048
_RANK = 64
_RANKS = (4, 8, 16, 32, 64, 128, 256)
_BFLOAT16 = torch.bfloat16
_BATCH = 512
# Width, layers, batches, and what varies.
_CALIBRATIONS = (
    *((width, 2, 4, "width") for width in (512, 1024, 2048)),
    *((1024, layers, 2, "layers") for layers in (1, 2, 4, 8)),
    *((1024, 1, batches, "tokens") for batches in (2, 4, 8, 16)),
)


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


def calibration(_: Path) -> Iterator[Point]:
    """`calibrate` of a random Llama, forward and Grams, over its width, its layers and the tokens.

    The model counts products with weights alone: norms, activations and attention come on top, less so at more width.
    """
    widest = inner_width(max(width for width, *_ in _CALIBRATIONS))
    forwards = forward_rates(widest, _BATCH, _BFLOAT16, _CPU)
    adding = gram_rates(widest, _BATCH, _BFLOAT16, _CPU)
    for width, layers, batches, variable in _CALIBRATIONS:
        inner, total = inner_width(width), batches * _BATCH
        # Of each of the seven linears one call, of each of the four inputs one Gram.
        forward = sum((work.forward(rows * columns, _BATCH, 2) for rows, columns, _ in linears(width).values()), Work())
        grams = sum((work.gram_accumulation(_BATCH, one, 2) for one in (width, width, width, inner)), Work())
        model = _llama(width, inner, layers)
        given = [{"input_ids": torch.arange(_BATCH)[None] % VOCABULARY}] * batches
        measured = _seconds(lambda m=model, g=given: calibrate(m, g, progress=False))
        predicted = layers * batches * (forwards.seconds(forward) + adding.seconds(grams))
        series, value = {
            "width": (f"{layers} layers, {total} tokens", width),
            "layers": (f"width {width}, {total} tokens", layers),
            "tokens": (f"width {width}, {layers} layers", total),
        }[variable]
        yield Point("calibrate", series, variable, value, measured, predicted)


def _llama(width: int, inner: int, layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(_BFLOAT16).eval()


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
    update = filled_update(width, width, rank, _BFLOAT16)
    predicted = rates.seconds(module_work(width, width, 2, rank, merges=True))
    return Point(phase, series, variable, value, _seconds(lambda: _harmonize(update)), predicted)


def _harmonize(update: WeightUpdate) -> None:
    width = update.shape[1]
    diagonal = GramDiagonal(torch.ones(width), torch.zeros(width, dtype=torch.bool), 1, 0.01, 0.01, 32)
    plan = plan_update(update, GramPair(diagonal, diagonal), 0.5, HPAConfig())
    merge_updates([plan], [update], [update.old if isinstance(update, LowRankUpdate) else update.new])


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
