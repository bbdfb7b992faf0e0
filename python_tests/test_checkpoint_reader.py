"""Reading checkpoints: what is returned is what was saved, and what is broken is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, in_a_child, save_sharded, save_single, tensors_of, write_raw
from helpers import assert_same_bits
from safetensors.torch import save_file

from hpa_ext.checkpoints import CheckpointError, CheckpointReader
from hpa_ext.checkpoints.dtypes import BITS, TORCH_DTYPES


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_reads_what_was_saved(tmp_path: Path, save) -> None:
    tensors = tensors_of()
    reader = CheckpointReader(save(tmp_path / "model", tensors))
    assert set(reader) == set(tensors)
    assert len(reader) == len(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(reader.read(name), tensor)
    assert reader.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert reader.config() == {"model_type": "llama"}


def test_order_is_that_of_the_files(tmp_path: Path) -> None:
    reader = CheckpointReader(save_sharded(tmp_path / "model", tensors_of(), shards=3))
    assert [shard.file_name for shard in reader.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(reader.entries.values()) == [item for shard in reader.shards for item in shard.entries]
    for shard in reader.shards:
        assert [item.start for item in shard.entries] == sorted(item.start for item in shard.entries)
        assert shard.metadata == {"format": "pt"}
        assert shard.size == shard.path.stat().st_size


def test_takes_a_file_and_an_index(tmp_path: Path) -> None:
    tensors = tensors_of()
    directory = save_sharded(tmp_path / "model", tensors)
    assert set(CheckpointReader(directory / "model.safetensors.index.json")) == set(tensors)
    one = CheckpointReader(directory / "model-00001-of-00002.safetensors")
    assert 0 < len(one) < len(tensors)
    assert one.index() is None
    named = CheckpointReader(directory, file="model-00001-of-00002.safetensors")
    assert set(named) == set(one)
    assert named.directory == one.directory == directory


def test_rows(tmp_path: Path) -> None:
    tensors = {"cube": torch.randn(5, 3, 2), "empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    reader = CheckpointReader(save_single(tmp_path / "model", tensors))
    for start in range(6):
        for stop in range(start, 6):
            assert_same_bits(reader.read_rows("cube", start, stop), tensors["cube"][start:stop])
    assert reader.read_rows("empty", 0, 0).shape == (0, 4)
    assert reader.read("empty").shape == (0, 4)
    assert reader.read("scalar") == 3.0
    for name, start, stop in (("cube", -1, 2), ("cube", 3, 2), ("cube", 0, 6), ("scalar", 0, 1)):
        with pytest.raises(ValueError, match=rf"rows: expected a range within '{name}'.*got {start} to {stop}"):
            reader.read_rows(name, start, stop)


def test_into_a_buffer(tmp_path: Path) -> None:
    tensors = tensors_of()
    reader = CheckpointReader(save_single(tmp_path / "model", tensors))
    name = "model.layers.1.mlp.up_proj.weight"
    out = torch.empty_like(tensors[name])
    assert reader.read(name, out=out) is out
    assert_same_bits(out, tensors[name])
    rows = torch.empty(2, 16, dtype=torch.bfloat16)
    assert_same_bits(reader.read_rows(name, 3, 5, out=rows), tensors[name][3:5])
    buffer = bytearray(6)
    reader.read_into(name, 2, memoryview(buffer))
    assert bytes(buffer) == bytes(tensors[name].view(torch.uint8).flatten()[2:8].tolist())
    for wrong in (out.T, out.float(), out[:2], torch.empty_like(out, device="meta"), out.view(-1)):
        with pytest.raises(ValueError, match="out: expected a contiguous CPU tensor"):
            reader.read(name, out=wrong)
    for offset in (-1, out.nbytes - 5):
        with pytest.raises(ValueError, match="range: expected within the 1536 bytes"):
            reader.read_into(name, offset, memoryview(buffer))


def test_every_type_is_copied_and_read_where_torch_has_it(tmp_path: Path) -> None:
    header, position = {}, 0
    for tag, bits in BITS.items():
        header[tag] = entry(tag, [4, 8], position, position + 4 * bits)
        position += 4 * bits
    data = bytes(i % 2 for i in range(position))
    reader = CheckpointReader(write_raw(tmp_path / "all.safetensors", header, data))
    for tag in BITS:
        item = reader.entries[tag]
        copied = bytearray(item.nbytes)
        reader.read_into(item, 0, memoryview(copied))
        start, stop = header[tag]["data_offsets"]
        assert bytes(copied) == data[start:stop]
        if tag in TORCH_DTYPES:
            tensor = reader.read(tag)
            assert tensor.dtype == TORCH_DTYPES[tag]
            assert tensor.shape == ((4, 4) if tag == "F4" else (4, 8))
            assert bytes(tensor.view(torch.uint8).flatten().tolist()) == data[start:stop]
            assert (
                bytes(reader.read_rows(tag, 1, 3).view(torch.uint8).flatten().tolist())
                == (data[start + (stop - start) // 4 : start + 3 * (stop - start) // 4])
            )
        else:
            with pytest.raises(
                CheckpointError, match=rf"tensor '{tag}' has the type {tag}, for which torch .* no dtype"
            ):
                reader.read(tag)


def test_torch_saves_the_types_as_they_are_read(tmp_path: Path) -> None:
    dtypes = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.int8]
    tensors = {str(dtype): torch.randint(0, 2, (3, 8)).to(torch.uint8).to(dtype) for dtype in dtypes}
    reader = CheckpointReader(save_single(tmp_path / "model", tensors))
    for name, tensor in tensors.items():
        assert_same_bits(reader.read(name), tensor)


def test_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    reader = CheckpointReader(save_single(tmp_path / "model", tensors_of()))
    with pytest.raises(CheckpointError, match=r"holds no tensor 'layers.0.norm.weight'.*similar: 'model.layers.0.norm"):
        reader.read("layers.0.norm.weight")


def test_memory_is_that_of_the_tensor(tmp_path: Path) -> None:
    """A file that is cut short while open raises; with mapped memory the process would die."""
    tensors = {f"t{i}": torch.full((1 << 16,), float(i)) for i in range(4)}
    reader = CheckpointReader(save_single(tmp_path / "model", tensors))
    tracemalloc.start()
    kept = reader.read("t0")
    assert tracemalloc.get_traced_memory()[1] < 1 << 16  # nothing of the tensor's size beside torch's own memory
    tracemalloc.stop()
    path = reader.shards[0].path
    os.truncate(path, reader.entries["t2"].start + 8)
    assert_same_bits(kept, tensors["t0"])
    assert_same_bits(reader.read("t1"), tensors["t1"])
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected tensor 't2' at bytes .* cut short after"):
        reader.read("t2")


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    first, second = tensors_of(seed=0), tensors_of(seed=1)
    directory = save_single(tmp_path / "model", first)
    reader = CheckpointReader(directory)
    save_file(second, tmp_path / "new")
    os.rename(tmp_path / "new", directory / "model.safetensors")
    for name, tensor in first.items():
        assert_same_bits(reader.read(name), tensor)


def test_threads_and_processes(tmp_path: Path) -> None:
    tensors = tensors_of(layers=8)
    reader = CheckpointReader(save_sharded(tmp_path / "model", tensors))
    copy = pickle.loads(pickle.dumps(reader))
    wrong = []

    def read() -> None:
        wrong.extend(name for name in tensors if not torch.equal(copy.read(name), tensors[name]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_close(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with CheckpointReader(save_sharded(tmp_path / "model", tensors_of())) as reader:
        reader.prefetch("model.embed_tokens.weight")
    with pytest.raises(ValueError, match="the reader is closed"):
        reader.read("model.embed_tokens.weight")
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_are_closed_when_opening_fails(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    os.truncate(directory / "model-00002-of-00002.safetensors", 100)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="truncated"):
        CheckpointReader(directory)
    assert len(os.listdir("/proc/self/fd")) == before


def test_read_errors_name_file_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(save_single(tmp_path / "model", tensors_of()))

    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(
        OSError, match=r"reading tensor 'model.embed_tokens.weight' failed: Input/output error.*model.s"
    ):
        reader.read("model.embed_tokens.weight")


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may return less than was asked for, as on network filesystems and when signals come."""
    tensors = tensors_of()
    reader = CheckpointReader(save_single(tmp_path / "model", tensors))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    assert_same_bits(reader.read("model.layers.0.norm.weight"), tensors["model.layers.0.norm.weight"])


# What is there instead of a checkpoint


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"other.safetensors"):
        CheckpointReader(tmp_path, file="other.safetensors")
    with pytest.raises(NotADirectoryError, match=r"expected a directory that holds 'x.safetensors'"):
        CheckpointReader(Path(__file__), file="x.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a .safetensors or .index.json file"):
        CheckpointReader(__file__)
    with pytest.raises(CheckpointError, match="got an empty directory"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (["pytorch_model.bin"], r"pytorch_model.bin: pickles are not read; convert .*save_pretrained"),
        (["consolidated.00.pth"], "pickles are not read"),
        (["adapter_model.safetensors", "adapter_config.json"], r"got an adapter \(adapter_model.safetensors\)"),
        (["weights.safetensors"], "got weights.safetensors; name the file to take"),
        (["model-00001-of-00002.safetensors.partial"], "got an unfinished output"),
        (["config.json"], "expected model.safetensors or model.safetensors.index.json, got config.json"),
    ],
)
def test_a_directory_without_weights(tmp_path: Path, present: list[str], message: str) -> None:
    for name in present:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_two_checkpoints_in_a_directory(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    save_file(tensors_of(), directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model.safetensors and also .*remove one of the two"):
        CheckpointReader(directory)
    assert len(CheckpointReader(directory, file="model.safetensors")) == len(tensors_of())
    index = {"weight_map": dict.fromkeys(tensors_of(), "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert CheckpointReader(directory).index() == index


def test_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file, got a directory"):
        CheckpointReader(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it must not wait for a writer
    with pytest.raises(CheckpointError, match="expected a regular file, got a pipe"):
        CheckpointReader(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.safetensors"))
        with pytest.raises(OSError, match=r"s\.safetensors"):
            CheckpointReader(tmp_path / "s.safetensors")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_single(tmp_path / "model", tensors_of())
    (directory / "model.safetensors").chmod(0)
    monkeypatch.chdir(directory)

    def read() -> None:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)  # root may read everything
        with pytest.raises(PermissionError, match=r"model\.safetensors"):
            CheckpointReader(".")

    assert in_a_child(read) == 0


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n", "a Git LFS pointer; .*git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"  <html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "a zip archive, such as torch.save writes"),
        (b"\x80\x02ctorch", "a pickle"),
        (b"", "an empty file"),
        (b"abc", "3 bytes: the file is truncated"),
        (b"#!/bin/sh\nexit 0\n", "bytes that begin with"),
        (bytes(100), "bytes that begin with"),
    ],
)
def test_something_else_by_the_name(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: expected a safetensors file, .*{message}"):
        CheckpointReader(tmp_path)


def test_the_index_as_a_pointer(tmp_path: Path) -> None:
    directory = save_sharded(tmp_path / "model", tensors_of())
    (directory / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"index.json: expected JSON, got a Git LFS pointer"):
        CheckpointReader(directory)


def test_configuration(tmp_path: Path) -> None:
    directory = save_single(tmp_path / "model", tensors_of())
    reader = CheckpointReader(directory)
    (directory / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, got a list"):
        reader.config()
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON, got text that does not parse"):
        reader.config()
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: expected the model's configuration, got no such file"):
        reader.config()
