"""Layers that are worked on together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

Item = TypeVar("Item")


def indices_by(keys: Iterable[Hashable]) -> list[list[int]]:
    """The indices of equal keys, together, in the order of their first."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())


def served_together(weights: Sequence[Tensor]) -> list[list[int]]:
    """The indices of weights that one call of a list operation takes: of one device, float64 apart from the others."""
    return indices_by((weight.device, weight.dtype.itemsize > 4) for weight in weights)


def batches(items: Iterable[Item], sizes: Iterable[int], limit: int) -> Iterator[list[Item]]:
    """Neighbours together while their sizes add up to at most `limit`; an item beyond it is alone."""
    batch: list[Item] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
