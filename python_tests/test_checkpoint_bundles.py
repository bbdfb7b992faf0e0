"""Weights that go through the pipeline together: in order, never more bytes than the limit, never across units."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpa_ext.checkpoints.header import TensorEntry
from hpa_ext.hpa.checkpoint.bundles import bundles
from hpa_ext.hpa.checkpoint.pieces import Piece, Unit


def unit(key, *kinds_and_sizes):
    pieces = tuple(
        Piece(TensorEntry(f"{key}.{i}", "U8", (size,), Path("f"), 0, size), kind, f"{key}.{i}", 0, size)
        for i, (kind, size) in enumerate(kinds_and_sizes)
    )
    return Unit(key, "f", key, pieces)


def cut(units, limit):
    return [[piece.entry.name for piece in bundle.pieces] for bundle in bundles(units, limit)]


def test_neighbours_are_merged_together_up_to_the_limit():
    units = [unit("a", *[("merge", 4)] * 4, ("merge", 11), ("merge", 11)), unit("b", ("merge", 4), ("merge", 4))]
    assert cut(units, 11) == [["a.0", "a.1"], ["a.2", "a.3"], ["a.4"], ["a.5"], ["b.0", "b.1"]]
    assert cut(units, None) == cut(units, 11), "the largest weight sets the limit"
    assert cut(units, 0) == [[f"a.{i}"] for i in range(6)] + [["b.0"], ["b.1"]]


@pytest.mark.parametrize("kind", ["copy", "update"])
def test_what_is_not_merged_is_alone_and_ends_a_bundle(kind):
    units = [unit("a", ("merge", 1), ("merge", 1), (kind, 1), (kind, 1), ("merge", 1))]
    assert cut(units, 100) == [["a.0", "a.1"], ["a.2"], ["a.3"], ["a.4"]]
    found = list(bundles(units, 100))
    assert [bundle.is_merged for bundle in found] == [True, False, False, True]
    assert [bundle.is_last for bundle in found] == [False, False, False, True]
    assert [bundle.nbytes for bundle in found] == [2, 1, 1, 1]
