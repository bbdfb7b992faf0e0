"""project_merge: ours against the device's bandwidth, and against eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .bench_column_scores import elements, list_cases, weight_cases, weight_lists, weight_pair
from .rows import Check, Row, Setting, make_row, relative_error, rounding_limit

_RETAINED_PERCENT = 10
_COEFFICIENT = 0.0371


def eager(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The formula as one writes it in torch; computed in float32, because bfloat16 would lose the small projection."""
    dtype = torch.float64 if w_old.dtype == torch.float64 else torch.float32
    adjusted = w_new.to(dtype) - coefficient * w_old.to(dtype)
    return torch.where(mask, w_old, adjusted.to(w_old.dtype))


def error_of(merged: Tensor, old: Tensor, mask: Tensor, exact: Tensor) -> float:
    """The relative error; infinite if a retained column is not the old one bit for bit."""
    return relative_error(merged, exact) if torch.equal(merged[:, mask], old[:, mask]) else float("inf")


def rows(setting: Setting) -> Iterator[Row]:
    """Those of one layer a call, then those of a list."""
    yield from _single_rows(setting)
    yield from _list_rows(setting)


def _single_rows(setting: Setting) -> Iterator[Row]:
    """``project_merge_vs_copy_bandwidth`` (the ratio is achieved / copy bandwidth) and ``project_merge_vs_eager``."""
    for height, width, dtype in weight_cases(setting):
        moved = 3 * height * width * dtype.itemsize

        def make(height: int = height, width: int = width, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            old, new = weight_pair(setting, height, width, dtype)
            mask = setting.randn(width).argsort() < width * _RETAINED_PERCENT // 100
            return old, new, mask, torch.full_like(old, torch.nan)

        sets = setting.sets(moved, make)
        old, new, mask, out = sets[0]
        exact = eager(old.double(), new.double(), mask, _COEFFICIENT)
        limit = rounding_limit(dtype)
        error = error_of(ops.project_merge(old, new, mask, _COEFFICIENT, out), old, mask, exact)
        peer_error = error_of(eager(old, new, mask, _COEFFICIENT), old, mask, exact)

        def into_buffer(index: int, sets: list = sets) -> object:
            old, new, mask, out = sets[index % len(sets)]
            return ops.project_merge(old, new, mask, _COEFFICIENT, out)

        def ours(index: int, sets: list = sets) -> object:
            old, new, mask, _ = sets[index % len(sets)]
            return ops.project_merge(old, new, mask, _COEFFICIENT)

        def peer(index: int, sets: list = sets) -> object:
            old, new, mask, _ = sets[index % len(sets)]
            return eager(old, new, mask, _COEFFICIENT)

        backend, work = ops.backend_of("project_merge", old), setting.traffic(moved)
        # A copy writes into memory that exists; eager torch allocates its result. Ours does as its peer does.
        yield make_row(
            "project_merge_vs_copy_bandwidth", "out, in", (height, width), dtype, "copy of as many bytes",
            setting.pair_with_copy(into_buffer, moved), work, Check(error, limit), backend,
        )  # fmt: skip
        yield make_row(
            "project_merge_vs_eager", "out, in", (height, width), dtype, "eager torch",
            setting.pair(ours, peer), work, Check(error, limit, peer_error), backend,
        )  # fmt: skip


def _list_rows(setting: Setting) -> Iterator[Row]:
    """``project_merge_list_vs_copy_bandwidth`` and ``.._vs_single`` in place, ``.._vs_eager``: a decoder layer."""
    for shapes, dtype in list_cases(setting):
        moved = 3 * elements(shapes) * dtype.itemsize
        old, new = weight_lists(setting, shapes, dtype)
        masks = [setting.randn(w.shape[1]).argsort() < w.shape[1] * _RETAINED_PERCENT // 100 for w in old]
        coefficients = torch.full((len(old),), _COEFFICIENT, device=setting.device)
        errors, peer_errors, limit = [], [], rounding_limit(dtype)
        for a, b, mask, merged in zip(
            old, new, masks, ops.project_merge_list(old, new, masks, coefficients), strict=True
        ):
            exact = eager(a.double(), b.double(), mask, _COEFFICIENT)
            errors.append(error_of(merged, a, mask, exact))
            peer_errors.append(error_of(eager(a, b, mask, _COEFFICIENT), a, mask, exact))
        check = Check(float(torch.tensor(errors).max()), limit, float(torch.tensor(peer_errors).max()))
        backend, work = ops.backend_of("project_merge", old[0]), setting.traffic(moved)

        # In place, as models are harmonized: the new weight moves by a little with every call.
        def in_place(index: int, arguments: tuple = (old, new, masks, coefficients)) -> object:
            return ops.project_merge_list(*arguments, arguments[1])

        def single(index: int, arguments: tuple = (old, new, masks, coefficients)) -> object:
            return [ops.project_merge(*layer, layer[1]) for layer in zip(*arguments, strict=True)]

        def ours(index: int, arguments: tuple = (old, new, masks, coefficients)) -> object:
            return ops.project_merge_list(*arguments)

        def peer(index: int, old: list = old, new: list = new, masks: list = masks) -> object:
            return [eager(a, b, mask, _COEFFICIENT) for a, b, mask in zip(old, new, masks, strict=True)]

        for metric, name, paired in (
            ("copy_bandwidth", "copy of as many bytes", setting.pair_with_copy(in_place, moved)),
            ("single", "one call a layer", setting.pair(in_place, single)),
            ("eager", "eager torch", setting.pair(ours, peer)),
        ):
            yield make_row(
                f"project_merge_list_vs_{metric}", "layers, elements", (len(shapes), elements(shapes)), dtype, name,
                paired, work, check, backend,
            )  # fmt: skip
