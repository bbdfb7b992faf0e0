"""Gram files: what is written comes back, one Gram at a time, and anything else is refused."""

from __future__ import annotations

import gc
import json

import pytest
import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor

from hpa_ext import Gram, GramCollection, HPAConfig, NumericalError, calibrate, harmonize_model
from hpa_ext.checkpoints import CheckpointError
from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.checkpoints.gram_writer import GramWriter, header_room
from hpa_ext.checkpoints.triangle import fill_from_triangle, triangle_length, triangle_strips
from hpa_ext.gram_diagonal import GramDiagonal


def total(gram: Gram) -> Tensor:
    return gram.state_dict()["sum"]


def some_grams() -> GramCollection:
    """Two modules of width 5 that share a Gram, and one of width 3 by itself."""
    shared, alone = Gram(5).update(torch.randn(9, 5)), Gram(3).update(torch.randn(4, 3))
    return GramCollection({"layers.0.q": shared, "layers.0.k": shared, "layers.0.o": alone})


@pytest.mark.parametrize("size", [1, 2, 7, 513, 1500])
def test_a_triangle_there_and_back(size, monkeypatch):
    monkeypatch.setattr("hpa_ext.checkpoints.triangle._STRIP_ELEMENTS", 100 * size)
    x = torch.randn(size, size)
    matrix = x + x.mT
    strips = list(triangle_strips(matrix))
    triangle = torch.cat(strips)
    assert len(triangle) == triangle_length(size)
    rows, columns = torch.triu_indices(size, size)
    assert torch.equal(triangle, matrix[rows, columns])
    back = torch.full((size, size), torch.nan)
    fill_from_triangle(back, lambda start, stop: triangle[start:stop].clone())
    assert torch.equal(back, matrix)
    assert size < 200 or len(strips) > 1


def test_full_grams_come_back_bit_for_bit(tmp_path):
    grams = some_grams()
    save_grams(grams, tmp_path / "g.safetensors", {"model": "a", "ids": ["1", 'quo"te\\']})
    stored = GramFile(tmp_path / "g.safetensors")
    assert list(stored) == list(grams) and len(stored) == 3 and "layers.0.q" in stored and "no" not in stored
    assert stored.form == "triangle" and stored.groups == {"layers.0.q": ["layers.0.q", "layers.0.k"],
                                                           "layers.0.o": ["layers.0.o"]}  # fmt: skip
    assert stored.provenance == {"model": "a", "ids": ["1", 'quo"te\\']}
    for name, gram in grams.items():
        assert torch.equal(total(stored[name]), total(gram))
        assert stored[name].token_count == gram.token_count == stored.token_count(name)
        assert stored.in_features(name) == gram.in_features
    with pytest.raises(KeyError):
        stored["no"]
    assert list(stored.problems()) == []
    with safe_open(tmp_path / "g.safetensors", "pt") as file:  # and safetensors reads it by itself
        assert file.get_tensor("layers.0.q.triangle").shape == (15,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.safetensors"]


def test_modules_of_a_group_give_one_object_and_one_gram_is_kept(tmp_path):
    save_grams(some_grams(), tmp_path / "g.safetensors")
    stored = GramFile(tmp_path / "g.safetensors")
    assert stored["layers.0.q"] is stored["layers.0.k"]
    held = stored["layers.0.q"]
    assert stored["layers.0.o"] is not held and stored["layers.0.k"] is held
    del held
    stored["layers.0.o"]
    gc.collect()
    assert len(stored._alive) == 1


def test_diagonals_are_those_of_the_grams(tmp_path):
    grams = some_grams()
    save_grams(grams, tmp_path / "g.safetensors", reduce="diagonal", damping=0.1)
    stored = GramFile(tmp_path / "g.safetensors")
    assert stored.form == "inverse_diagonal" and stored.damping("layers.0.k") == 0.1
    for name, gram in grams.items():
        expected = GramDiagonal.of(gram, 0.1)
        assert torch.equal(stored[name].sum_inverse, expected.sum_inverse)
        assert torch.equal(stored[name].dead, expected.dead)
        assert torch.equal(stored[name].inverse_diagonal(0.1), expected.inverse_diagonal(0.1))
        assert (stored[name].token_count, stored[name].precision_bits) == (gram.token_count, expected.precision_bits)
    assert stored["layers.0.q"] is stored["layers.0.k"]
    with pytest.raises(ValueError, match="damping"):
        stored["layers.0.q"].inverse_diagonal(0.01)


def test_harmonize_model_takes_files(tmp_path):
    old = tiny_models.llama()
    new = tiny_models.tuned(old)
    safety = calibrate(old, tiny_models.batches(old, seed=5), progress=False)
    task = calibrate(new, tiny_models.batches(new, seed=6), progress=False)
    results = []
    for reduce in (False, None, "diagonal"):
        merged = tiny_models.tuned(old)
        files = (safety, task)
        if reduce is not False:
            files = []
            for name, grams in (("s", safety), ("t", task)):
                save_grams(grams, tmp_path / f"{name}.safetensors", reduce=reduce)
                files.append(GramFile(tmp_path / f"{name}.safetensors"))
        harmonize_model(old, merged, *files, HPAConfig(), progress=False)
        results.append(tiny_models.snapshot(merged))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        torch.testing.assert_close(results[2][name], value, rtol=0, atol=1e-6)


def test_a_gram_without_tokens_comes_back_empty(tmp_path):
    grams = GramCollection({"a": Gram(4), "b": Gram(4).update(torch.randn(6, 4))})
    for reduce in (None, "diagonal"):
        save_grams(grams, tmp_path / "g.safetensors", reduce=reduce)
        stored = GramFile(tmp_path / "g.safetensors")
        assert stored["a"].token_count == 0 and stored["a"].in_features == 4 and stored["b"].token_count == 6


def test_bad_numbers_are_named_and_nothing_is_left(tmp_path):
    grams = some_grams()
    total(grams["layers.0.o"])[0, 0] = torch.nan
    for reduce in (None, "diagonal"):
        with pytest.raises(NumericalError, match=r"^layers\.0\.o: "):
            save_grams(grams, tmp_path / "g.safetensors", reduce=reduce)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_survives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    save_grams(some_grams(), path)
    before = path.read_bytes()
    monkeypatch.setattr(GramWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_grams(some_grams(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    with pytest.raises(FileNotFoundError):
        GramFile(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="expected a Gram file"):
        GramFile(path)
    save_grams(some_grams(), path)
    contents = path.read_bytes()
    path.write_bytes(contents[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        GramFile(path)
    path.write_bytes(contents[:-4] + b"abcd")
    (problem,) = GramFile(path).problems()
    assert "layers.0.o.triangle" in problem and "SHA-256" in problem
    path.write_bytes(contents.replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    with pytest.raises(CheckpointError, match="expected Gram file format 1, got 7"):
        GramFile(path)
    path.write_bytes(contents.replace(b'\\"in_features\\": 3', b'\\"in_features\\": 4'))
    with pytest.raises(CheckpointError, match=r"layers\.0\.o\.triangle: expected F32 \[10\], got F32 \[6\]"):
        GramFile(path)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="grams: expected"):
        save_grams({"a": Gram(2)}, tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match="reduce: expected"):
        save_grams(some_grams(), tmp_path / "g.safetensors", reduce="all")
    with pytest.raises(ValueError, match=r"path: expected .*\.safetensors, got"):
        save_grams(some_grams(), tmp_path / "grams")


def test_a_writer_goes_on_where_another_stopped(tmp_path):
    path, straight = tmp_path / "g.safetensors", tmp_path / "h.safetensors"
    grams = some_grams()
    room = header_room(grams, {})
    save_grams(grams, straight)
    writer = GramWriter(path, "triangle", room)
    first = writer.add(["layers.0.q", "layers.0.k"], grams["layers.0.q"])
    writer.close()
    with open(path, "ab") as file:
        file.write(b"half of another Gram")
    finished = [type(first).from_dict(json.loads(json.dumps(first.to_dict())))]
    with GramWriter(path, "triangle", room, finished) as writer:
        writer.add(["layers.0.o"], grams["layers.0.o"])
        writer.finish({})
    assert path.read_bytes() == straight.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="finished Grams, found 0"):
        GramWriter(path, "triangle", room, finished)
