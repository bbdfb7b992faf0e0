"""column_scores: ours against the device's bandwidth, and against eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row, relative_error

_ERROR_LIMIT = 1e-5
_UPDATE_SCALE = 0.002  # against 0.02 of the weights: a tuning step's order of magnitude

LLAVA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""(out, in) of q, k, v, o, gate, up and down."""


def eager(w_old: Tensor, w_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three sums as one writes them in torch, in float32 (float64 for float64 weights)."""
    dtype = torch.float64 if w_old.dtype == torch.float64 else torch.float32
    old = w_old.to(dtype)
    update = w_new.to(dtype) - old
    return (update**2).sum(0), (update * old).sum(), (old**2).sum()


def weight_cases(setting: Setting) -> list[tuple[int, int, torch.dtype]]:
    """(out, in, dtype) of the weights, for all benchmarks that stream a pair of them."""
    return setting.cases(
        quick=[(48, 64, torch.bfloat16)],
        default=[(4096, 4096, torch.bfloat16)],
        full=[(11008, 4096, torch.bfloat16), (4096, 4096, torch.float32)],
    )


def weight_pair(setting: Setting, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random weight and the same after a small random update."""
    old = setting.randn(rows, columns, scale=0.02)
    return old.to(dtype), (old + setting.randn(rows, columns, scale=_UPDATE_SCALE)).to(dtype)


def list_cases(setting: Setting) -> list[tuple[list[tuple[int, int]], torch.dtype]]:
    """Shapes and dtype of each list to measure. A list is larger than any cache, so one set of buffers is enough."""
    return setting.cases(
        quick=[([(48, 64), (32, 24), (64, 48)], torch.bfloat16)], default=[(LLAVA_7B, torch.bfloat16)], full=[]
    )


def weight_lists(
    setting: Setting, shapes: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Old and new weights of these shapes."""
    pairs = [weight_pair(setting, *shape, dtype) for shape in shapes]
    return [old for old, _ in pairs], [new for _, new in pairs]


def elements(shapes: list[tuple[int, int]]) -> int:
    """Of all layers together."""
    return sum(rows * columns for rows, columns in shapes)


def worst_error(results: tuple[Tensor, ...], exact: tuple[Tensor, ...], scale: Tensor) -> float:
    """The largest relative error of the sums; the inner product, which may cancel, relative to `scale`."""
    squares, inner, norm = results
    errors = (
        relative_error(squares, exact[0]),
        float((inner.double() - exact[1]).abs() / scale),
        relative_error(norm, exact[2]),
    )
    return float(torch.tensor(errors, dtype=torch.float64).max())  # NaN stays NaN


def rows(setting: Setting) -> Iterator[Row]:
    """Those of one layer a call, then those of a list."""
    yield from _single_rows(setting)
    yield from _list_rows(setting)


def _single_rows(setting: Setting) -> Iterator[Row]:
    """``column_scores_vs_copy_bandwidth`` (the ratio is achieved / copy bandwidth) and ``column_scores_vs_eager``."""
    for height, width, dtype in weight_cases(setting):
        moved = 2 * height * width * dtype.itemsize
        sets = setting.sets(moved, lambda h=height, w=width, d=dtype: weight_pair(setting, h, w, d))
        old, new = sets[0]
        exact = eager(old.double(), new.double())
        scale = (exact[0].sum() * exact[2]).sqrt()
        error = worst_error(ops.column_scores(old, new), exact, scale)

        def ours(index: int, sets: list = sets) -> object:
            return ops.column_scores(*sets[index % len(sets)])

        backend, work = ops.backend_of("column_scores", old), setting.traffic(moved, reads_only=True)
        yield make_row(
            "column_scores_vs_copy_bandwidth", "out, in", (height, width), dtype, "copy of as many bytes",
            setting.pair_with_copy(ours, moved), work, Check(error, _ERROR_LIMIT), backend,
        )  # fmt: skip
        paired = setting.pair(ours, lambda index, sets=sets: eager(*sets[index % len(sets)]))
        yield make_row(
            "column_scores_vs_eager", "out, in", (height, width), dtype, "eager torch",
            paired, work, Check(error, _ERROR_LIMIT, worst_error(eager(old, new), exact, scale)), backend,
        )  # fmt: skip


def _list_rows(setting: Setting) -> Iterator[Row]:
    """``column_scores_list_vs_copy_bandwidth``, ``.._vs_single`` and ``.._vs_eager``, for the linears of a layer."""
    for shapes, dtype in list_cases(setting):
        moved = 2 * elements(shapes) * dtype.itemsize
        old, new = weight_lists(setting, shapes, dtype)
        squares, inner, norm = ops.column_scores_list(old, new)
        errors, peer_errors = [], []
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            exact = eager(a.double(), b.double())
            scale = (exact[0].sum() * exact[2]).sqrt()
            errors.append(worst_error((squares[i], inner[i], norm[i]), exact, scale))
            peer_errors.append(worst_error(eager(a, b), exact, scale))
        backend, work = ops.backend_of("column_scores", old[0]), setting.traffic(moved, reads_only=True)
        # A NaN wins: it is no measurement of an error.
        check = Check(float(torch.tensor(errors).max()), _ERROR_LIMIT, float(torch.tensor(peer_errors).max()))

        def ours(index: int, old: list = old, new: list = new) -> object:
            return ops.column_scores_list(old, new)

        def single(index: int, old: list = old, new: list = new) -> object:
            return [ops.column_scores(a, b) for a, b in zip(old, new, strict=True)]

        def peer(index: int, old: list = old, new: list = new) -> object:
            return [eager(a, b) for a, b in zip(old, new, strict=True)]

        for metric, name, paired in (
            ("copy_bandwidth", "copy of as many bytes", setting.pair_with_copy(ours, moved)),
            ("single", "one call a layer", setting.pair(ours, single)),
            ("eager", "eager torch", setting.pair(ours, peer)),
        ):
            yield make_row(
                f"column_scores_list_vs_{metric}", "layers, elements", (len(shapes), elements(shapes)), dtype, name,
                paired, work, check, backend,
            )  # fmt: skip
