"""Writing checkpoints: the bytes that safetensors would write, in any order, complete or not there."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_files import contents, entry, in_a_child, save_sharded, save_single, tensors_of, write_raw
from helpers import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpa_ext.checkpoints import CheckpointError, CheckpointReader, RunningDigest, ShardedWriter, ShardPlan, index_of
from hpa_ext.checkpoints.coverage import Coverage
from hpa_ext.checkpoints.dtypes import BITS, TORCH_DTYPES, dtype_tag

_NAME = "model.layers.1.mlp.up_proj.weight"


def _plan(tensors: dict[str, torch.Tensor], file_name: str = "model.safetensors") -> ShardPlan:
    described = [(name, dtype_tag(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    return ShardPlan.sorted(file_name, {"format": "pt"}, described)


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    """Every type that torch can save, empty and scalar tensors, names in any script."""
    dtypes = [dtype for tag, dtype in TORCH_DTYPES.items() if tag != "F4"]
    tensors = {f"t.{dtype}": torch.arange(6).to(torch.uint8).view(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), 'ä"\\\n\x1f日': torch.randn(3)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    plan = _plan(tensors, "ours.safetensors")
    with ShardedWriter(tmp_path, [plan]) as writer:
        writer.create()
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert plan.size == writer.required_bytes == (tmp_path / "ours.safetensors").stat().st_size


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_a_copy_is_identical(tmp_path: Path, save) -> None:
    source = save(tmp_path / "model", tensors_of())
    reader = CheckpointReader(source)
    plans = [ShardPlan.of_shard(shard) for shard in reader.shards]
    with ShardedWriter(tmp_path / "copy", plans, reader.index()) as writer:
        writer.create()
        for name in reversed(list(reader)):  # the order of writing does not show
            writer.write(name, reader.read(name))
        writer.sync()
        digests = {plan.file_name: writer.digest(plan.file_name) for plan in plans}
        writer.finish()
    copied = contents(tmp_path / "copy")
    originals = contents(source)
    assert {name: copied[name] for name in digests} == {name: originals[name] for name in digests} == digests
    assert set(CheckpointReader(tmp_path / "copy")) == set(reader)
    with safe_open(tmp_path / "copy" / plans[0].file_name, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_index_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    theirs = (tmp_path / "theirs" / "model.safetensors.index.json").read_text()
    reader = CheckpointReader(tmp_path / "theirs")
    assert len(reader.shards) > 1
    plans = [ShardPlan.of_shard(shard) for shard in reader.shards]
    more = {key: value for key, value in reader.index()["metadata"].items() if key != "total_size"}
    with ShardedWriter(tmp_path / "ours", plans, index_of(plans, more)) as writer:
        writer.create()
        for name in reader:
            writer.write(name, reader.read(name))
        writer.finish()
    assert (tmp_path / "ours" / "model.safetensors.index.json").read_text() == theirs


def test_rows_bytes_and_layouts(tmp_path: Path) -> None:
    tensor = torch.randn(7, 4, 3)
    plan = _plan({"rows": tensor, "bytes": tensor, "transposed": tensor, "scalar": tensor[0, 0, 0]})
    with ShardedWriter(tmp_path, [plan]) as writer:
        writer.create()
        for start, stop in ((5, 7), (0, 2), (2, 2), (2, 5)):
            assert "rows" in writer.missing()
            writer.write("rows", tensor[start:stop], row=start)
        data = bytes(tensor.view(torch.uint8).flatten().tolist())
        writer.write_bytes("bytes", 100, data[100:])
        writer.write_bytes("bytes", 0, memoryview(data)[:110])
        writer.write("transposed", tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0))
        assert writer.missing() == ["scalar"]
        writer.write("scalar", tensor[0, 0, 0].requires_grad_())
        assert writer.missing() == []
        writer.finish()
    for name, loaded in load_file(tmp_path / "model.safetensors").items():
        assert_same_bits(loaded, tensor[0, 0, 0] if name == "scalar" else tensor)


def test_types_without_torch_are_copied(tmp_path: Path) -> None:
    header, position = {}, 0
    for tag, bits in BITS.items():
        header[tag] = entry(tag, [4, 8], position, position + 4 * bits)
        position += 4 * bits
    source = write_raw(tmp_path / "source.safetensors", header, os.urandom(position))
    reader = CheckpointReader(source)
    (tmp_path / "out").mkdir()
    with ShardedWriter(tmp_path / "out", [ShardPlan.of_shard(reader.shards[0])]) as writer:
        writer.create()
        for name, item in reader.entries.items():
            if name in TORCH_DTYPES:
                writer.write(name, reader.read_rows(name, 0, 3))
                writer.write(name, reader.read_rows(name, 3, 4), row=3)
            else:
                buffer = memoryview(bytearray(item.nbytes))
                reader.read_into(item, 0, buffer)
                writer.write_bytes(name, 0, buffer)
                with pytest.raises(ValueError, match=f"{name}: expected {name}, got torch.uint8"):
                    writer.write(name, torch.zeros(4, 8, dtype=torch.uint8))
        writer.finish()
    assert (tmp_path / "out" / "source.safetensors").read_bytes() == source.read_bytes()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, [_plan({"a": torch.zeros(4, 3), "s": torch.zeros(())})]) as writer:
        with pytest.raises(ValueError, match=r"expected an open writer, got one before create"):
            writer.write("a", torch.zeros(4, 3))
        writer.create()
        for tensor, row in (
            (torch.zeros(4, 4), 0),
            (torch.zeros(3, 4), 0),
            (torch.zeros(12), 0),
            (torch.zeros(4, 3), 1),
            (torch.zeros(1, 3), 4),
            (torch.zeros(1, 3), -1),
            (torch.zeros(5, 3), 0),
            (torch.zeros(()), 0),
        ):
            with pytest.raises(ValueError, match=r"a: expected \[4, 3\], or rows of it, got .* from row"):
                writer.write("a", tensor, row)
        with pytest.raises(ValueError, match=r"a: expected torch.float32, got torch.float64"):
            writer.write("a", torch.zeros(4, 3, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"s: expected \[\], or rows"):
            writer.write("s", torch.zeros(()), row=1)
        with pytest.raises(ValueError, match=r"name: expected a tensor of the plans, got 'b'"):
            writer.write("b", torch.zeros(1))
        for offset, count in ((-1, 2), (47, 2), (0, 49)):
            with pytest.raises(ValueError, match=r"a: expected a range within its 48 bytes"):
                writer.write_bytes("a", offset, bytes(count))
        with pytest.raises(ValueError, match=r"file_name: expected a file of the plans, got 'x'"):
            writer.digest("x")
        with pytest.raises(ValueError, match="expected one that is not open yet"):
            writer.create()
        assert writer.missing() == ["a", "s"]
        assert (tmp_path / "model.safetensors.partial").read_bytes().endswith(bytes(52))  # nothing was written


def test_finish_refuses_gaps(tmp_path: Path) -> None:
    tensors = tensors_of(layers=1)
    with ShardedWriter(tmp_path / "out", [_plan(tensors)], None) as writer:
        writer.create()
        writer.write("model.embed_tokens.weight", tensors["model.embed_tokens.weight"][1:], row=1)
        with pytest.raises(ValueError, match=r"expected every tensor to be written, got 4 of 4 that are not: model"):
            writer.finish()
        assert os.listdir(tmp_path / "out") == ["model.safetensors.partial"]
        writer.mark_written(list(tensors)[:3])
        with pytest.raises(ValueError, match=r"got 1 of 4 that are not: model.layers.0.norm.weight"):
            writer.finish()
        writer.abandon()
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("file_name", "metadata", "tensors", "message"),
    [
        ("../m.safetensors", {}, [], "file_name: expected a plain name"),
        ("m.bin", {}, [], "file_name: expected a plain name that ends in .safetensors"),
        ("m.safetensors", {"a": 1}, [], "metadata of m.safetensors: expected texts, got 'a': 1"),
        ("m.safetensors", {}, [("a", "X", [1])], "tensor 'a' of m.safetensors: expected a type"),
        ("m.safetensors", {}, [("a", "F4", [3])], "tensor 'a' of m.safetensors: expected sizes that fill whole bytes"),
        ("m.safetensors", {}, [("a", "F32", [-1])], "tensor 'a' of m.safetensors: expected sizes"),
        ("m.safetensors", {}, [("a", "F32", [1])] * 2, "tensor 'a' of m.safetensors: expected a text that comes once"),
        (
            "m.safetensors",
            {},
            [("__metadata__", "F32", [1])],
            "tensor '__metadata__' of m.safetensors: expected a text",
        ),
    ],
)
def test_plans_that_cannot_be(file_name: str, metadata: dict, tensors: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardPlan(file_name, metadata, tensors)


def test_writers_that_cannot_be(tmp_path: Path) -> None:
    one, two = (ShardPlan(f"{name}.safetensors", {}, [("a", "F32", [1])]) for name in "mn")
    with pytest.raises(ValueError, match=r"expected every tensor once, got 'a' in m.safetensors and n.safetensors"):
        ShardedWriter(tmp_path, [one, two])
    with pytest.raises(ValueError, match="expected one or more files of different names"):
        ShardedWriter(tmp_path, [one, one])
    with pytest.raises(ValueError, match="expected one or more files of different names"):
        ShardedWriter(tmp_path, [])
    with pytest.raises(ValueError, match="got 2 that differ: 'a', 'b'"):
        ShardedWriter(tmp_path, [one], {"weight_map": {"a": "n.safetensors", "b": "m.safetensors"}})
    with pytest.raises(ValueError, match="index_file: expected a plain name"):
        ShardedWriter(tmp_path, [one], index_file="../i.json")


def test_existing_files_are_kept_unless_replaced(tmp_path: Path) -> None:
    plan = _plan({"a": torch.zeros(4)})
    for present in ("model.safetensors", "model.safetensors.partial"):
        path = tmp_path / present
        path.write_text("mine")
        with pytest.raises(FileExistsError, match=present):
            ShardedWriter(tmp_path, [plan]).create()
        assert path.read_text() == "mine"
        with ShardedWriter(tmp_path, [plan]) as writer:
            writer.create(replace=True)
        assert os.listdir(tmp_path) == ["model.safetensors.partial"]
        (tmp_path / "model.safetensors.partial").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("mine")
    with pytest.raises(FileExistsError, match=r"index.json"):
        ShardedWriter(tmp_path, [plan], index_of([plan])).create()
    ShardedWriter(tmp_path, [plan], index_of([plan])).create(replace=True)
    assert not index.exists()


def test_open_takes_only_its_own_files(tmp_path: Path) -> None:
    plan = _plan({"a": torch.zeros(4)})
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        ShardedWriter(tmp_path, [plan]).open()
    ShardedWriter(tmp_path, [plan]).create()
    with pytest.raises(CheckpointError, match="expected the header of the planned file, found another"):
        ShardedWriter(tmp_path, [_plan({"b": torch.zeros(4)})]).open()
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes, found \d+: not the file that was begun"):
        ShardedWriter(tmp_path, [_plan({"a": torch.zeros(40)})]).open()
    before = len(os.listdir("/proc/self/fd"))
    with ShardedWriter(tmp_path, [plan]) as writer:
        writer.open()
        writer.write("a", torch.ones(4))
        writer.finish()
    assert len(os.listdir("/proc/self/fd")) == before
    assert_same_bits(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    tensors = tensors_of(layers=4)
    plans = [_plan(tensors)]
    with ShardedWriter(tmp_path / "out", plans) as writer:
        writer.create()

        def other() -> None:
            with ShardedWriter(tmp_path / "out", plans) as theirs:
                theirs.open()
                for name in list(tensors)[::2]:
                    theirs.write(name, tensors[name])
                theirs.sync()

        assert in_a_child(other) == 0
        for name in list(tensors)[1::2]:
            writer.write(name, tensors[name])
        writer.mark_written(list(tensors)[::2])
        writer.finish()
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_threads(tmp_path: Path) -> None:
    tensors = tensors_of(layers=8, width=32)
    with ShardedWriter(tmp_path / "out", [_plan(tensors)]) as writer:
        writer.create()

        def write(names: list[str]) -> None:
            for name in names:
                for row in range(tensors[name].shape[0]):
                    writer.write(name, tensors[name][row : row + 1], row)
                writer.sync([name])

        threads = [threading.Thread(target=write, args=(list(tensors)[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor)


def test_running_digest(tmp_path: Path) -> None:
    tensors = tensors_of()
    plan = _plan(tensors)
    with ShardedWriter(tmp_path, [plan]) as writer:
        writer.create()
        digest = RunningDigest(writer.descriptor(plan.file_name), tmp_path / plan.file_name)
        for name, _, _ in plan.tensors:
            writer.write(name, tensors[name])
            digest.advance(plan.ranges[name][1])
        assert digest.hexdigest() == writer.digest(plan.file_name)
        writer.finish()
    assert digest.hexdigest() == contents(tmp_path)["model.safetensors"]


def test_finish_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_sharded(tmp_path / "model", tensors_of(), shards=3)
    reader = CheckpointReader(source)
    plans, rename = [ShardPlan.of_shard(shard) for shard in reader.shards], os.rename
    for stop_after in range(4):
        out = tmp_path / f"out{stop_after}"
        with ShardedWriter(out, plans, reader.index()) as writer:
            writer.create()
            for name in reader:
                writer.write(name, reader.read(name))
            renamed: list[str] = []

            def stopping(old: Path, new: Path, renamed=renamed, stop_after=stop_after) -> None:
                if len(renamed) == stop_after:
                    raise KeyboardInterrupt
                renamed.append(str(new))
                rename(old, new)

            monkeypatch.setattr(os, "rename", stopping)
            with pytest.raises(KeyboardInterrupt):
                writer.finish()
        monkeypatch.setattr(os, "rename", rename)
        assert not (out / "model.safetensors.index.json").exists()
        with pytest.raises(CheckpointError):
            CheckpointReader(out)
        with ShardedWriter(out, plans, reader.index()) as writer:
            writer.open()
            writer.mark_written(reader)
            writer.finish()
        assert set(CheckpointReader(out)) == set(reader)
        assert sorted(os.listdir(out)) == sorted([*(plan.file_name for plan in plans), "model.safetensors.index.json"])
        assert json.loads((out / "model.safetensors.index.json").read_text()) == reader.index()


def test_coverage() -> None:
    coverage, covered = Coverage(), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        start = int(torch.randint(0, 200, (), generator=generator))
        stop = start + int(torch.randint(0, 9, (), generator=generator))
        coverage.add(start, stop)
        covered |= set(range(start, stop))
        assert coverage.count() == len(covered)
