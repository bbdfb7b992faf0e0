"""Weights that go through the pipeline together: in order, never more bytes than the limit, never across units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import contents
from harmonize_inputs import make_inputs

from hpa_ext.checkpoints.buffers import Buffers, Row
from hpa_ext.checkpoints.header import TensorEntry
from hpa_ext.hpa.checkpoint import harmonize_checkpoint, merge
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


def test_tensors_in_a_row_are_apart_and_free_when_all_are_released():
    pool = Buffers()
    row = Row(pool, [12, 0, 6, 64])
    shapes = [((3,), torch.float32), ((0, 4), torch.float32), ((3, 1), torch.bfloat16), ((64,), torch.uint8)]
    tensors = [row.take(*shape) for shape in shapes]
    beyond = row.take((1,), torch.uint8)
    for number, tensor in enumerate([*tensors, beyond]):
        tensor.fill_(number)
    assert [tensor.tolist() for tensor in tensors] == [[0] * 3, [], [[2]] * 3, [3] * 64]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel())
    address = tensors[0].untyped_storage().data_ptr()
    assert beyond.untyped_storage().data_ptr() != address
    pool.release(tensors[3], tensors[0])
    apart = pool.take([12], torch.uint8)
    assert apart.untyped_storage().data_ptr() != address, "the third tensor is in use"
    pool.release(tensors[2])
    assert pool.take([192], torch.uint8).untyped_storage().data_ptr() == address


def test_small_weights_take_the_memory_of_the_large_ones():
    """As the pipeline takes and releases: one bundle is read, one computed with, and one written."""
    layer = [("merge", 86), ("merge", 86), ("merge", 86), *[("merge", 32)] * 4]
    units = [unit(f"layer{i}", *[(kind, size << 10) for kind, size in layer]) for i in range(4)]
    pool, held = Buffers(), {}
    computed, written = ([], []), []
    for bundle in bundles(units):
        sizes = [piece.nbytes for piece in bundle.pieces]
        rows = [Row(pool, sizes) for _ in range(2)]
        read = [[row.take([size], torch.uint8) for size in sizes] for row in rows]
        for tensor in (*read[0], *read[1]):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        pool.release(*written, *computed[0])
        written, computed = computed[1], read
    assert sum(held.values()) == 5 * (86 << 10)


@pytest.mark.parametrize("new", ["new", "adapter"])
def test_bundles_change_no_byte_and_are_read_into_rows(tmp_path, monkeypatch, new):
    inputs = make_inputs(tmp_path / "inputs")
    taken, sizes = [], []
    take, compute, cut_into = Buffers.take, merge.MergeRun._compute, merge.bundles

    def counting(self, shape, dtype):
        taken.append(shape)
        return take(self, shape, dtype)

    def counted(self, bundle, read):
        sizes.append(len(bundle.pieces) if bundle.is_merged else 0)
        return compute(self, bundle, read)

    monkeypatch.setattr(Buffers, "take", counting)
    monkeypatch.setattr(merge.MergeRun, "_compute", counted)
    written = []
    for limit in (0, 1 << 20):
        monkeypatch.setattr(merge, "bundles", lambda units, limit=limit: cut_into(units, limit))
        taken.clear(), sizes.clear()
        harmonize_checkpoint(**inputs.arguments(new), out=tmp_path / f"out{limit}", progress=False)
        written.append(contents(tmp_path / f"out{limit}"))
        merged = sum(size > 0 for size in sizes)
        assert max(sizes) > 1 if limit else max(sizes) == 1
        if new == "new":
            assert len(taken) == 2 * merged + (len(sizes) - merged)
    assert written[0] == written[1]
