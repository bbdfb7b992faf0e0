"""Headers and indices that lie: every claim is checked against the file before it is trusted."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, save_sharded, tensors_of, write_raw
from safetensors.torch import save_file

from hpa_ext.checkpoints import CheckpointError, CheckpointReader
from hpa_ext.checkpoints import header as header_module

_A = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _A}, 4, r"expected 72 bytes by its header, found 68: the file is truncated, 4 bytes .* tensor 'a'"),
        ({"a": _A}, 0, "truncated, 8 bytes are missing, from tensor 'a' on"),
        ({"a": _A, "b": entry("F32", [2], 8, 16)}, 12, "truncated, 4 bytes are missing, from tensor 'b' on"),
        ({"a": _A}, 9, "found 73: 1 bytes too many"),
        ({}, 1, "1 bytes too many"),
        ({"a": _A, "b": entry("F32", [2], 4, 12)}, 12, r"tensor 'b': .* it overlaps tensor 'a'"),
        ({"a": _A, "b": _A}, 8, r"tensor 'b': .* it overlaps tensor 'a'"),
        ({"a": _A, "b": entry("F32", [2], 12, 20)}, 20, r"tensor 'b': .* it leaves a gap after tensor 'a'"),
        ({"a": entry("F32", [2], 8, 16)}, 16, r"tensor 'a': .* it leaves a gap after the header"),
        ({"a": entry("F32", [3], 0, 8)}, 8, r"tensor 'a': expected 12 bytes for F32 \[3\], got the offsets"),
        ({"a": entry("F32", [2], 8, 0)}, 8, r"tensor 'a': expected 8 bytes .* -8 bytes"),
        ({"a": entry("F4", [3], 0, 2)}, 2, r"tensor 'a': expected whole bytes, got 12 bits"),
        ({"a": entry("Q8", [2], 0, 2)}, 2, r"tensor 'a': expected a type of safetensors \(BOOL, .*got 'Q8'"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": entry("F32", [True, 2], 0, 8)}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": entry("F32", [1 << 70], 0, 8)}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, 8, r"tensor 'a': expected \d+ bytes for F32"),
        ({"a": entry("F32", "2", 0, 8)}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": {**_A, "data_offsets": [0, 4, 8]}}, 8, r"tensor 'a': expected a type, a shape and two offsets"),
        ({"a": {**_A, "extra": 1}}, 8, r"tensor 'a': expected dtype, shape and data_offsets in the header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, r"tensor 'a': expected dtype, shape and data_offsets"),
        ({"a": [1, 2]}, 8, r"tensor 'a': expected dtype, shape and data_offsets in the header"),
        ({"__metadata__": {"n": 1}, "a": _A}, 8, r"__metadata__ in the header: expected texts by name"),
        ({"__metadata__": "n", "a": _A}, 8, r"__metadata__ in the header: expected texts by name"),
        (b'{"a":1,"a":2}', 0, r"header: .* the key 'a' comes twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, r"the key 'dtype' comes twice"),
        (b"{", 0, r"header: expected JSON, got text that does not parse"),
        (b'{"\xff":1}', 0, r"header: expected JSON, got text that does not parse"),
        (b"{" * 100_000, 0, r"header: expected JSON, got text that does not parse"),
        (b'{"a":' + b"[" * 100_000, 0, r"header: expected JSON, got text that does not parse"),
    ],
)
def test_refused(tmp_path: Path, header: dict | bytes, data: int, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data, pad=True)
    with pytest.raises(CheckpointError, match=f"^{path}.*{message}"):
        CheckpointReader(path)


@pytest.mark.parametrize("claimed", [99, 100_000_001, (1 << 64) - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}      ")
    expected = r"a header of 99 bytes, found 8: the file is truncated" if claimed == 99 else "bytes that begin with"
    with pytest.raises(CheckpointError, match=expected):
        CheckpointReader(path)


def test_allowed_oddities(tmp_path: Path) -> None:
    """Files that safetensors takes: no tensors, no padding, empty tensors, unordered keys, names in any script."""
    assert len(CheckpointReader(write_raw(tmp_path / "a.safetensors", {}))) == 0
    header = {"β ": entry("F32", [1], 8, 12), "a": _A, "none": entry("F32", [0, 5], 8, 8)}
    reader = CheckpointReader(write_raw(tmp_path / "b.safetensors", header, 12, pad=False))
    assert list(reader) == ["a", "none", "β "]
    assert reader.read("none").shape == (0, 5)
    assert len(CheckpointReader(write_raw(tmp_path / "c.safetensors", {"__metadata__": None, "a": _A}, 8))) == 1


def test_safetensors_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"a": _A}, 8)

    def refuse(*args: object, **kwargs: object) -> None:
        raise header_module.SafetensorError("not mine")

    monkeypatch.setattr(header_module, "safe_open", refuse)
    with pytest.raises(CheckpointError, match="safetensors refuses the file: not mine"):
        CheckpointReader(path)
    # A type that an older safetensors does not know does not make it refuse the whole file.
    CheckpointReader(write_raw(tmp_path / "b.safetensors", {"a": entry("F6_E2M3", [4], 0, 3)}, 3))


def test_any_cut_is_told(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4), "b": torch.randn(3)}, whole)
    contents = whole.read_bytes()
    for length in range(len(contents)):
        whole.write_bytes(contents[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty file"):
            CheckpointReader(whole)


# Indices


def _change_index(directory: Path, change) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd.safetensors", "../model.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "a\0b"],
)
def test_an_index_cannot_lead_out(tmp_path: Path, name: str) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    save_file(tensors_of(), tmp_path / "model.safetensors")
    _change_index(directory, lambda names: names.update({"model.embed_tokens.weight": name}))
    with pytest.raises(CheckpointError, match=r"tensor 'model.embed_tokens.weight': expected the plain name of a file"):
        CheckpointReader(directory)
    with pytest.raises(CheckpointError, match=r"file: expected the plain name of a file"):
        CheckpointReader(directory, file=name)


def test_links_of_the_cache_are_followed(tmp_path: Path) -> None:
    """Snapshots of the Hugging Face cache are links to ../../blobs."""
    stored = save_sharded(tmp_path / "stored", tensors_of())
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(stored.iterdir())):
        os.rename(path, blobs / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    reader = CheckpointReader(snapshot)
    assert torch.equal(reader.read("model.embed_tokens.weight"), tensors_of()["model.embed_tokens.weight"])
    assert [path.name for path in reader.side_files()] == ["config.json", "tokenizer.json"]
    reader.shards[0].path.resolve().unlink()
    with pytest.raises(CheckpointError, match=r"of which 1 are absent: model-00001-of-00002.safetensors"):
        CheckpointReader(snapshot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: names.pop("model.embed_tokens.weight"),
            r"does not list 1 tensors that the shards hold: 'model.embed_tokens.weight'",
        ),
        (
            lambda names: names.update({"ghost": "model-00002-of-00002.safetensors"}),
            r"says that model-00002-of-00002.safetensors holds 'ghost'; it does not",
        ),
        (
            lambda names: names.update({"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}),
            r"holds 'model.embed_tokens.weight'; it is in model-00001-of-00002.safetensors",
        ),
        (lambda names: names.update({"x": "y.bin"}), r"tensor 'x': expected a .safetensors file, got 'y.bin'"),
        (lambda names: names.update({"x": 1}), r"tensor 'x': expected a file name, got 1"),
        (lambda names: names.update({"x": "z.safetensors"}), r"names 3 files, of which 1 are absent: z.safetensors"),
        (lambda names: names.clear(), r"expected file names by tensor under 'weight_map', got {}"),
    ],
)
def test_index_and_shards_differ(tmp_path: Path, change, message: str) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    _change_index(directory, change)
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json: .*{message}"):
        CheckpointReader(directory)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    second = directory / "model-00002-of-00002.safetensors"
    held = {name: tensor for name, tensor in tensors_of().items() if name in CheckpointReader(second)}
    save_file({**held, "model.embed_tokens.weight": torch.zeros(2)}, second)
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' is in both model-00001-of.* and model-00002"
    ):
        CheckpointReader(directory)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    path = directory / "model.safetensors.index.json"
    path.write_text(
        path.read_text().replace('"weight_map": {', '"weight_map": {"model.norm": "a", "model.norm": "b", ')
    )
    with pytest.raises(CheckpointError, match=r"the key 'model.norm' comes twice"):
        CheckpointReader(directory)
