"""Verifying: an untouched output passes, and whatever is done to it is found and named."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import adapter_models
import pytest
import tiny_models
import torch
from checkpoint_files import save_sharded, save_single, tensors_of
from checkpoint_run import run
from safetensors.torch import load_file, save_file

import hpa_ext
from hpa_ext.checkpoints import (
    CheckpointError,
    CheckpointReader,
    LayerMasks,
    identity,
    progress,
    read_masks,
    retained,
    verify_checkpoint,
    write_manifest,
    write_masks,
)
from hpa_ext.checkpoints.gram_file import save_grams
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.cli import verify as command

_SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_sharded(tmp_path / "model", tensors_of())


@pytest.fixture
def out(tmp_path: Path, source: Path) -> Path:
    run(source, tmp_path / "out")
    return tmp_path / "out"


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_untouched(out: Path, source: Path) -> None:
    report = verify_checkpoint(out, old=source)
    assert report.ok
    assert report.problems == report.notes == []
    assert report.files == 6
    assert report.nbytes == sum(path.stat().st_size for path in out.iterdir() if path.name != "hpa_manifest.json")
    assert report.tensors == len(tensors_of()) + 9  # three masks for each of three layers
    assert report.retained_columns == 3 * 16
    assert "verified: 6 files" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda out: _flip(out / _SHARD, -1), rf"{_SHARD}: expected SHA-256 .* the contents changed"),
        (lambda out: _flip(out / "tokenizer.json", 0), r"tokenizer.json: expected SHA-256"),
        (lambda out: os.truncate(out / _SHARD, 200), rf"{_SHARD}: expected \d+ bytes by the manifest, found 200"),
        (lambda out: (out / _SHARD).unlink(), rf"{_SHARD}: in the manifest, but absent"),
        (lambda out: (out / "model.safetensors.index.json").unlink(), r"index.json: in the manifest, but absent"),
        (lambda out: (out / "hpa_manifest.json").unlink(), r"no hpa_manifest.json"),
        (lambda out: (out / "hpa_manifest.json").write_text("{"), r"hpa_manifest.json: expected JSON"),
        (lambda out: (out / "journal.jsonl").touch(), "an unfinished output; go on with it by --resume"),
        (
            lambda out: (out / "x.safetensors.partial").touch(),
            r"x.safetensors.partial: an unfinished file \(1 in all\)",
        ),
        (lambda out: shutil.copy(out / _SHARD, out / "y.safetensors"), r"y.safetensors: not in the manifest"),
        (lambda out: (out / "z.safetensors").touch(), r"z.safetensors: expected a safetensors file, got an empty file"),
        (lambda out: ((out / _SHARD).unlink(), (out / _SHARD).mkdir()), rf"{_SHARD}"),
        (
            lambda out: (out / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"),
            r"tokenizer.json: expected 2 bytes by the manifest",
        ),
    ],
)
def test_harmed(out: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(out)
    report = verify_checkpoint(out)
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report.problems
    assert "PROBLEMS" in str(report)


def test_every_file_counts(out: Path) -> None:
    for path in sorted(out.iterdir()):
        if path.name != "hpa_manifest.json":
            _flip(path, path.stat().st_size // 2)
            report = verify_checkpoint(out)
            assert any(str(path) in problem for problem in report.problems)
            _flip(path, path.stat().st_size // 2)
    assert verify_checkpoint(out).ok


def test_an_index_that_does_not_fit_its_shards(out: Path) -> None:
    """Even where the manifest has been written anew over it."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.embed_tokens.weight")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(out, identity("checkpoint", {}, {}))
    (problem,) = verify_checkpoint(out).problems
    assert "does not list 1 tensors that the shards hold: 'model.embed_tokens.weight'" in problem


def test_further_files_are_noted(out: Path) -> None:
    (out / "notes.md").write_text("mine")
    (out / ".cache").mkdir()
    (out / ".cache" / "x.safetensors").touch()
    report = verify_checkpoint(out)
    assert report.ok
    assert report.notes == [f"{out / 'notes.md'}: not in the manifest"]


def test_retained_columns_are_compared_bit_by_bit(tmp_path: Path) -> None:
    """A single bit in a retained column is found; whatever happens in the other columns is not a problem."""
    torch.manual_seed(0)
    old = {"q.weight": torch.randn(6, 5).bfloat16(), "conv": torch.randn(4, 3, 7), "rows.weight": torch.randn(5, 6)}
    new = {"renamed.q.weight": old["q.weight"].clone(), "conv": old["conv"].clone(), "rows.weight": old["rows.weight"]}
    places = {
        "q": ("renamed.q.weight", "q.weight", 1),
        "conv": ("conv", "conv", 2),
        "rows": ("rows.weight",) * 2 + (0,),
    }
    sizes, masks = {"q": 5, "conv": 7, "rows": 5}, {}
    for module, (tensor, old_tensor, dimension) in places.items():
        kept = torch.arange(sizes[module]) % 2 == 0
        masks[module] = LayerMasks(kept, ~kept, kept, tensor, old_tensor, dimension)
    save_single(tmp_path / "old", old)

    def verify(changed: dict[str, torch.Tensor]) -> list[str]:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        save_single(out, changed)
        write_masks(out, masks)
        write_manifest(out, identity("checkpoint", {}, {}))
        report = verify_checkpoint(out, old=tmp_path / "old")
        if report.ok:
            assert report.retained_columns == 3 + 4 + 3
        return report.problems

    assert verify(new) == []
    free = {name: tensor.clone() for name, tensor in new.items()}
    free["renamed.q.weight"][:, 1::2] += 1
    free["conv"][..., 1::2] = torch.nan
    free["rows.weight"][1::2] = 0
    assert verify(free) == []
    bits = {"q": ("renamed.q.weight", (5, 4)), "conv": ("conv", (3, 2, 0)), "rows": ("rows.weight", (2, 5))}
    for module, (name, place) in bits.items():
        harmed = {other: tensor.clone() for other, tensor in free.items()}
        integers = harmed[name].view(torch.int16 if harmed[name].element_size() == 2 else torch.int32)
        integers[place] ^= 1
        (problem,) = verify(harmed)
        assert re.match(rf"{module}: 1 of \d retained columns differ from the old model's in '{name}'", problem)
    zero = {other: tensor.clone() for other, tensor in free.items()}
    signed = {"q.weight": old["q.weight"].clone().index_fill_(1, torch.tensor([0]), 0.0)}
    save_single(tmp_path / "old", {**old, **signed})
    zero["renamed.q.weight"][:, 0] = -0.0
    (problem,) = verify(zero)
    assert problem.startswith("q: 1 of 3")


def test_large_weights_are_compared_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retained, "_BLOCK_BYTES", 100)
    weight = torch.randn(50, 4)
    other = weight.clone()
    other[49, 3] += 1
    save_single(tmp_path / "old", {"w": weight})
    save_single(tmp_path / "out", {"w": other})
    everything = torch.ones(4, dtype=torch.bool)
    write_masks(tmp_path / "out", {"w": LayerMasks(everything, everything, everything, "w", "w", 1)})
    write_manifest(tmp_path / "out", identity("checkpoint", {}, {}))
    (problem,) = verify_checkpoint(tmp_path / "out", old=tmp_path / "old").problems
    assert problem.startswith("w: 1 of 4 retained columns differ")


def test_an_old_model_that_does_not_fit(tmp_path: Path, out: Path, source: Path) -> None:
    other = save_single(tmp_path / "other", {name: torch.zeros(3, 3) for name in list(tensors_of())[:9]})
    report = verify_checkpoint(out, old=other)
    assert any("expected weights of one shape" in problem for problem in report.problems)
    assert any("holds no tensor 'model.layers.2.norm.weight'" in problem for problem in report.problems)
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(out, old=tmp_path / "absent")
    (out / "hpa_masks.safetensors").unlink()
    assert any(
        "no hpa_masks.safetensors, so there is nothing" in p for p in verify_checkpoint(out, old=source).problems
    )


def test_an_old_model_in_another_precision(tmp_path: Path) -> None:
    weight = torch.randn(8, 4)
    save_single(tmp_path / "old", {"w": weight})
    save_single(tmp_path / "out", {"w": weight.bfloat16()})
    everything = torch.ones(4, dtype=torch.bool)
    write_masks(tmp_path / "out", {"w": LayerMasks(everything, everything, everything, "w", "w", 1)})
    write_manifest(tmp_path / "out", identity("checkpoint", {}, {}))
    assert verify_checkpoint(tmp_path / "out", old=tmp_path / "old").ok


def test_masks_come_back(tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}": LayerMasks(*(torch.rand(7) < 0.5 for _ in range(3)), f"a{i}", f"b{i}", i) for i in range(2)
    }
    path = write_masks(tmp_path, layers)
    assert set(load_file(path)) == {f"{module}.{kind}" for module in layers for kind in (
        "retained", "safety_columns", "task_columns")}  # fmt: skip
    back = read_masks(tmp_path)
    assert list(back) == list(layers)
    for module, layer in layers.items():
        assert torch.equal(back[module].retained, layer.retained)
        assert torch.equal(back[module].task_columns, layer.task_columns)
        assert (back[module].tensor, back[module].old_tensor, back[module].dimension) == (
            layer.tensor, layer.old_tensor, layer.dimension,
        )  # fmt: skip
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"hpa_masks.safetensors: expected masks and the tensors"):
        read_masks(tmp_path)


def test_another_old_model_is_told(tmp_path: Path, out: Path) -> None:
    other = save_sharded(tmp_path / "other", tensors_of(seed=1))
    report = verify_checkpoint(out, old=other)
    assert f"{other}: not the old model that the output was made from" in report.problems
    assert any("16 of 16 retained columns differ" in problem for problem in report.problems)
    with pytest.raises(ValueError, match="old_adapters: expected none without an old model"):
        verify_checkpoint(out, old_adapters=[other])


def test_adapters_of_the_old_model_count(tmp_path: Path) -> None:
    """The retained columns are those of the old model with its adapters merged, not those of the files."""
    model = tiny_models.llama()
    adapter_models.save(model, tmp_path / "old", torch.bfloat16)
    adapter_models.adapter(model, tmp_path / "adapter")
    weights = CheckpointWeights(tmp_path / "old", [tmp_path / "adapter"])
    module = next(name for name in weights.adapters[0].updates if name.endswith("q_proj"))
    name, kept = f"{module}.weight", torch.arange(32) % 3 == 0
    tensors = {disk: weights.tensor(canonical) for canonical, disk in weights.disk_name.items()}
    tensors[weights.disk_name[name]][:, ~kept] += 1
    save_single(tmp_path / "out", tensors)
    write_masks(tmp_path / "out", {module: LayerMasks(kept, kept, kept, *[weights.disk_name[name]] * 2, 1)})
    inputs = {"old": weights.reader.fingerprint(), "old_adapters": [weights.adapters[0].fingerprint()]}
    write_manifest(tmp_path / "out", identity("checkpoint", inputs, {}))
    report = verify_checkpoint(tmp_path / "out", tmp_path / "old", old_adapters=[tmp_path / "adapter"])
    assert report.problems == []
    assert report.retained_columns == int(kept.sum())
    forgotten, differing = verify_checkpoint(tmp_path / "out", tmp_path / "old").problems
    assert "expected the 1 adapters of the old model that it was made from, got 0" in forgotten
    assert "retained columns differ" in differing


def test_gram_files(tmp_path: Path) -> None:
    gram = hpa_ext.Gram(8).update(torch.randn(20, 8))
    save_grams(hpa_ext.GramCollection({"q": gram}), tmp_path / "grams.safetensors")
    report = verify_checkpoint(tmp_path / "grams.safetensors")
    assert report.ok
    assert not report.notes
    _flip(tmp_path / "grams.safetensors", -1)
    (problem,) = verify_checkpoint(tmp_path / "grams.safetensors").problems
    assert re.search(r"grams.safetensors: q.\w+: expected SHA-256", problem)


def test_single_files(tmp_path: Path) -> None:
    save_file(tensors_of(), tmp_path / "a.safetensors")
    report = verify_checkpoint(tmp_path / "a.safetensors")
    assert report.ok
    assert "a single file" in report.notes[0]
    os.truncate(tmp_path / "a.safetensors", 1000)
    assert not verify_checkpoint(tmp_path / "a.safetensors").ok
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(tmp_path / "absent")


def test_an_unfinished_directory(tmp_path: Path, out: Path) -> None:
    os.rename(out, tmp_path / "x.partial")
    assert "an unfinished output" in verify_checkpoint(tmp_path / "x.partial").problems[0]


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0.0)
    for terminal, shown in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress.ByteProgress("verifying", 200, shown) as walk:
            walk.add(50)
        text = capsys.readouterr().err
        assert bool(text) == (terminal and shown)
        if text:
            assert "verifying  25.0 %" in text
            assert text.endswith("\x1b[K")


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["verify", *arguments])
    return args.run(args)


def test_command(tmp_path: Path, out: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(str(out), "--old", str(source), "--json", str(tmp_path / "r.json")) == 0
    assert "verified: 6 files" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["retained_columns"] == 48
    assert _run(str(out), "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    _flip(out / _SHARD, -1)
    assert _run(str(out), "--quiet", "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert _run(str(out)) == 1
    assert "the contents changed" in capsys.readouterr().err
    assert CheckpointReader(out)  # what changed is a weight; the header is as it was
