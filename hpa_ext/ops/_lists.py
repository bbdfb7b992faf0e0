"""Checks of operations that take a list of layers. Messages name the layer: ``w_new[3]: expected ..., got ...``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

    Matrices whose memory interleaves, such as column slices of one tensor, are apart.
    """
    for i, out in enumerate(outs):
        if repeats_elements(out):
            raise ValueError(f"outs[{i}]: expected elements apart from each other, got strides {out.stride()}")
    places = [
        Place(name, i, matrix, name == "outs")
        for name, matrices in (("outs", outs), ("w_old", w_old), ("w_new", w_new))
        for i, matrix in enumerate(matrices)
    ]
    found = first_overlap(places, within_layers=False)
    if found is not None:
        written, other = found
        raise ValueError(
            f"{written.name}[{written.layer}]: expected memory that no other layer uses, got a tensor that overlaps "
            f"{other.name}[{other.layer}]"
        )


def repeats_elements(matrix: Tensor) -> bool:
    """Whether the matrix is an expanded view, with several elements in one place."""
    if matrix.layout != torch.strided or matrix.numel() == 0:
        return False
    return any(s == 0 and n > 1 for n, s in zip(matrix.shape, matrix.stride(), strict=True))


@dataclass(frozen=True)
class Place:
    """A matrix that belongs to a layer, under the name that messages have for it."""

    name: str
    layer: int
    matrix: Tensor
    is_written: bool


def first_overlap(places: Iterable[Place], *, within_layers: bool) -> tuple[Place, Place] | None:
    """Two places that share memory, the first of them written; None if there are no such.

    Args:
        places: on any devices; what is no dense matrix does not count.
        within_layers: whether places of one layer count, which may be meant to be the same.
    """
    spans = []
    for number, place in enumerate(places):
        matrix = place.matrix
        if matrix.layout == torch.strided and matrix.dim() == 2 and matrix.numel() > 0:
            start = matrix.data_ptr()
            reach = sum((n - 1) * s for n, s in zip(matrix.shape, matrix.stride(), strict=True)) + 1
            spans.append((start, start + reach * matrix.element_size(), number, place))
    spans.sort(key=lambda span: span[:3])
    reaching: list[tuple[int, Place]] = []  # those met so far that end behind the current start
    for start, end, _, place in spans:
        reaching = [(last, other) for last, other in reaching if last > start]
        for _, other in reaching:
            if not (place.is_written or other.is_written) or place.matrix.device != other.matrix.device:
                continue
            if (within_layers or place.layer != other.layer) and not _interleave(other.matrix, place.matrix):
                return (place, other) if place.is_written else (other, place)
        reaching.append((end, place))
    return None


def _interleave(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices, the second one beginning later, are different rows or columns of one larger matrix."""
    first, second = (m.mT if m.stride(0) < m.stride(1) else m for m in (first, second))
    if first.element_size() != second.element_size() or first.stride() != second.stride():
        return False
    between_rows, between_columns = first.stride()
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if rest != 0 or between_columns < 1 or between_rows % between_columns != 0:
        return False
    if distance % between_columns != 0:
        return True
    width, column = between_rows // between_columns, distance % between_rows // between_columns
    return column >= first.shape[1] and column + second.shape[1] <= width
