"""Checks of operations that take a list of layers. Messages name the layer: ``w_new[3]: expected ..., got ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpa_ext.ops._checks import check_same, check_weight_pair, describe


def as_list(name: str, values: Sequence[Any], length: int | None = None, like: str = "") -> list[Any]:
    """The values as a list of their own, of `length` entries (None: any number), one for each of `like`."""
    # A tensor is a sequence of its rows, and a string one of its letters; neither is a list of layers.
    if isinstance(values, (Tensor, str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list, one entry for each layer, got {describe(values)}")
    if length is not None and len(values) != length:
        raise ValueError(f"{name}: expected {length} entries, one for each of {like}, got {len(values)}")
    return list(values)


def check_one_device(name: str, values: Sequence[Tensor]) -> None:
    """All tensors are on the device of the first, and either all of them are float64 or none."""
    for i, value in enumerate(values):
        check_same(f"{name}[{i}]", value, f"{name}[0]", values[0], dtype=False)
        if (value.dtype == torch.float64) != (values[0].dtype == torch.float64):
            raise TypeError(
                f"{name}[{i}]: expected float64 in all layers or in none ({name}[0] is {describe(values[0])}), "
                f"got {describe(value)}"
            )


def check_weight_lists(w_old: Sequence[Tensor], w_new: Sequence[Tensor]) -> None:
    """Pairs of weights [out, in] on one device; float64 for all or for none, other dtypes mixed as they come."""
    as_list("w_new", w_new, len(w_old), "w_old")
    for i, (old, new) in enumerate(zip(w_old, w_new, strict=True)):
        check_weight_pair(old, new, f"[{i}]")
    check_one_device("w_old", w_old)


def check_apart(outs: Sequence[Tensor], w_old: Sequence[Tensor], w_new: Sequence[Tensor]) -> None:
    """No layer writes where another one reads or writes, nor any twice to one place.

    Matrices with one row stride that lie side by side, such as column slices of one tensor, are apart.
    """
    spans = []
    for name, matrices in (("outs", outs), ("w_old", w_old), ("w_new", w_new)):
        for i, matrix in enumerate(matrices):
            if matrix.numel() == 0:
                continue
            if name == "outs" and any(s == 0 and n > 1 for n, s in zip(matrix.shape, matrix.stride(), strict=True)):
                raise ValueError(f"outs[{i}]: expected elements apart from each other, got strides {matrix.stride()}")
            start = matrix.data_ptr()
            reach = sum((n - 1) * s for n, s in zip(matrix.shape, matrix.stride(), strict=True)) + 1
            spans.append((start, start + reach * matrix.element_size(), i, name, matrix))
    spans.sort(key=lambda span: span[:3])
    reaching: list[tuple[int, int, int, str, Tensor]] = []  # those met so far that end behind the current start
    for span in spans:
        start, _, i, name, matrix = span
        reaching = [other for other in reaching if other[1] > start]
        for _, _, j, other_name, other in reaching:
            written = "outs" in (name, other_name)
            if written and i != j and not _side_by_side(other, matrix):
                (k, at), (m, of) = sorted(((i, name), (j, other_name)), key=lambda place: place[1] != "outs")
                raise ValueError(
                    f"{at}[{k}]: expected memory that no other layer uses, got a tensor that overlaps {of}[{m}]"
                )
        reaching.append(span)


def _side_by_side(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices, the second one beginning later, are different columns of rows of one length."""
    if first.element_size() != second.element_size() or first.stride() != second.stride() or first.stride(1) != 1:
        return False
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if rest != 0 or first.stride(0) < 1:
        return False
    column = distance % first.stride(0)
    return column >= first.shape[1] and column + second.shape[1] <= first.stride(0)
