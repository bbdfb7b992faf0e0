"""low_rank: HPA's sums and merge from a LoRA adapter, against the same through full weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops, reference

from .rows import Check, Row, Setting, Work, make_row, relative_error, rounding_limit

_RETAINED_PERCENT = 10
_SCALING = 2.0

# The weight [out, in], the rank, and what A and B are stored in; the weight is bfloat16.
_QUICK = [((96, 130), 4)]
_DEFAULT = [((4096, 4096), rank) for rank in (8, 64, 128)]
_FULL = [((4096, 4096), 16), ((4096, 4096), 256)] + [
    (shape, rank) for shape in ((11008, 4096), (4096, 11008)) for rank in (8, 16, 64, 128)
]


def new_weight(old: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W_new``, rounded once, the fastest way torch has: in bfloat16 where A and B are, else in float32."""
    if a.dtype == old.dtype:
        return torch.addmm(old, b, a, alpha=_SCALING)
    return torch.addmm(old.float(), b, a, alpha=_SCALING).to(old.dtype)


def through_full_weights(old: Tensor, new: Tensor, mask: Tensor) -> Tensor:
    """Sums and merge of two weights, into the new one."""
    _, inner_product, old_squared_norm = ops.column_scores(old, new)
    return ops.project_merge(old, new, mask, inner_product / old_squared_norm, new)


def low_rank(old: Tensor, a: Tensor, b: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Sums and merge of a weight and its adapter."""
    _, inner_product, old_squared_norm = ops.low_rank_scores(old, a, b, _SCALING)
    return ops.low_rank_merge(old, a, b, _SCALING, mask, inner_product / old_squared_norm, out)


def in_blocks(old: Tensor, a: Tensor, b: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """The same in torch without the new weight: products of some rows at a time in float32."""
    _, inner_product, old_squared_norm = reference.low_rank_scores(old, a, b, _SCALING)
    reference.low_rank_merge(old, a, b, _SCALING, mask, inner_product / old_squared_norm, out)
    return out


def least_work(setting: Setting, shape: tuple[int, int], rank: int, old: Tensor, a: Tensor) -> Work:
    """Two products of B A, or reading the weight twice and writing it once: what takes longer at the ceilings."""
    elements = shape[0] * shape[1]
    products = setting.operations(4 * elements * rank, a.dtype)
    traffic = setting.traffic(3 * elements * old.element_size())
    share = products.amount / products.ceiling_rate / 1e3, traffic.amount / traffic.ceiling_rate
    return products if share[0] > share[1] else traffic


def rows(setting: Setting) -> Iterator[Row]:
    """Sums and merge of one weight together, in place: against full weights with and without forming the new one, and
    against torch by blocks of rows (``low_rank_vs_full_weights``, ``_vs_formed_weights``, ``_vs_blocks``).
    """
    for shape, rank in setting.cases(_QUICK, _DEFAULT, _FULL):
        for factors in (torch.bfloat16, torch.float32):
            yield from _rows_of(setting, shape, rank, factors)


def _rows_of(setting: Setting, shape: tuple[int, int], rank: int, factors: torch.dtype) -> Iterator[Row]:
    height, width = shape

    def make() -> tuple[Tensor, ...]:
        old = setting.randn(height, width, dtype=torch.bfloat16, scale=0.02)
        a = setting.randn(rank, width, dtype=factors, scale=0.1)
        b = setting.randn(height, rank, dtype=factors, scale=0.02)
        mask = setting.randn(width).argsort() < width * _RETAINED_PERCENT // 100
        return old, a, b, mask, new_weight(old, a, b)

    sets = setting.sets(2 * height * width * 2, make)
    old, a, b, mask, new = sets[0]
    exact = in_blocks(old.double(), a.double(), b.double(), mask, torch.empty_like(old, dtype=torch.float64))
    check = Check(
        _error(low_rank(old, a, b, mask, torch.empty_like(old)), old, mask, exact),
        rounding_limit(old.dtype),
        _error(through_full_weights(old, new.clone(), mask), old, mask, exact),
    )

    def ours(index: int) -> object:
        old, a, b, mask, _ = sets[index % len(sets)]
        return low_rank(old, a, b, mask, old)

    def with_forming(index: int) -> object:
        old, a, b, mask, _ = sets[index % len(sets)]
        return through_full_weights(old, new_weight(old, a, b), mask)

    def formed(index: int) -> object:
        old, _, _, mask, new = sets[index % len(sets)]
        return through_full_weights(old, new, mask)

    def blocks(index: int) -> object:
        old, a, b, mask, _ = sets[index % len(sets)]
        return in_blocks(old, a, b, mask, old)

    backend, work = ops.low_rank_backend(old, a, b), least_work(setting, shape, rank, old, a)
    for metric, peer, call in (
        ("low_rank_vs_full_weights", "W_new formed, then column_scores, project_merge", with_forming),
        ("low_rank_vs_formed_weights", "column_scores, project_merge of a W_new that is there", formed),
        ("low_rank_vs_blocks", "torch, blocks of 512 rows", blocks),
    ):
        yield make_row(
            metric,
            "out, in, rank",
            (height, width, rank),
            factors,
            peer,
            setting.pair(ours, call),
            work,
            check,
            backend,
        )


def _error(merged: Tensor, old: Tensor, mask: Tensor, exact: Tensor) -> float:
    """The relative error; infinite if a retained column is not the old one bit for bit."""
    return relative_error(merged, exact) if torch.equal(merged[:, mask], old[:, mask]) else float("inf")
