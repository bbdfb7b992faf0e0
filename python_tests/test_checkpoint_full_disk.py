"""A full disk is found before the work, or told clearly when it fills up meanwhile; nothing looks finished."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import contents, in_a_child, save_sharded, tensors_of
from checkpoint_run import run

from hpa_ext.checkpoints import CheckpointReader, ShardedWriter, ShardPlan, partial_directory

_MIB = 1 << 20


def _plan(count: int) -> ShardPlan:
    """A file of `count` MiB of data."""
    return ShardPlan("model.safetensors", {}, [("a", "U8", [count, _MIB])])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "hpa_test", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount(8)")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def _fill(directory: Path, leave: int) -> None:
    """Leave that many bytes free."""
    info = os.statvfs(directory)
    with open(directory / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, info.f_bavail * info.f_frsize - leave)


def test_too_large_for_the_disk(small_disk: Path) -> None:
    with pytest.raises(OSError, match=r"too little room for 1 files: 9\d{6} bytes needed, 8\d{6} bytes free") as raised:
        ShardedWriter(small_disk / "out", [_plan(9)]).create()
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(small_disk / "out") == []


def test_room_for_what_comes_later(small_disk: Path) -> None:
    with pytest.raises(OSError, match="too little room"):
        ShardedWriter(small_disk / "out", [_plan(5)]).create(reserve_bytes=4 * _MIB)
    with ShardedWriter(small_disk / "out", [_plan(5)]) as writer:
        writer.create(reserve_bytes=2 * _MIB)
    info = os.statvfs(small_disk)
    assert info.f_bavail * info.f_frsize < 4 * _MIB  # the 5 MiB are taken before anything is written


def test_what_was_reserved_can_be_written_on_a_full_disk(small_disk: Path) -> None:
    with ShardedWriter(small_disk / "out", [_plan(5)]) as writer:
        writer.create()
        _fill(small_disk, leave=0)
        data = torch.arange(5 * _MIB).to(torch.uint8).view(5, _MIB)
        writer.write("a", data)
        writer.finish()
    assert torch.equal(CheckpointReader(small_disk / "out").read("a"), data)


def test_a_disk_that_fills_up_meanwhile(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a filesystem that cannot reserve, writing fails; the message names file, tensor and bytes."""

    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with ShardedWriter(small_disk / "out", [_plan(5)]) as writer:
        writer.create()
        monkeypatch.undo()
        _fill(small_disk, leave=_MIB)
        message = (
            r"writing tensor 'a' failed: No space left.*; \d+ bytes to go, 0 bytes free.*model.safetensors.partial"
        )
        with pytest.raises(OSError, match=message) as raised:
            writer.write("a", torch.ones(5, _MIB, dtype=torch.uint8))
        assert raised.value.errno == errno.ENOSPC
        assert writer.missing() == ["a"]
        os.unlink(small_disk / "ballast")
        writer.write("a", torch.ones(5, _MIB, dtype=torch.uint8))  # room again: it goes on
        writer.finish()
    assert os.listdir(small_disk / "out") == ["model.safetensors"]


def test_a_run_on_a_disk_that_fills_up_is_resumable(small_disk: Path, tmp_path: Path) -> None:
    """The journal, the side files and the manifest have no room: nothing is published, and resuming ends the same."""
    source = save_sharded(tmp_path / "model", tensors_of(width=64, layers=6))
    run(source, tmp_path / "expected")
    expected, failures = contents(tmp_path / "expected"), 0
    size = sum(path.stat().st_size for path in source.iterdir())
    out = small_disk / "out"
    for leave in range(size - 40_000, size + 150_000, 4096):
        _fill(small_disk, leave)
        try:
            run(source, out)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert not out.exists()
            failures += 1
        os.unlink(small_disk / "ballast")
        run(source, out, resume=True)
        assert contents(out) == expected
        subprocess.run(["rm", "-r", str(out)], check=True)
    assert failures > 10


def test_create_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may take the room between the look and the reservation."""
    plans = [ShardPlan(f"{i}.safetensors", {}, [(f"t{i}", "U8", [100])]) for i in range(3)]
    fallocate, calls = os.posix_fallocate, []

    def full(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fallocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = r"too little room: No space left on device; \d+ bytes needed, \d+ bytes free.*1.safetensors.partial"
    with pytest.raises(OSError, match=message) as raised:
        ShardedWriter(tmp_path / "out", plans).create()
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "out") == []


def test_any_other_error_of_reserving_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match=r"reserving \d+ bytes failed: Input/output error"):
        ShardedWriter(tmp_path / "out", [_plan(1)]).create()
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_of_writing_name_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with ShardedWriter(tmp_path, [_plan(1)]) as writer:
        writer.create()

        def broken(*args: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "pwrite", broken)
        with pytest.raises(OSError, match=rf"writing tensor 'a' failed: {os.strerror(number)}") as raised:
            writer.write("a", torch.zeros(1, _MIB, dtype=torch.uint8))
        assert raised.value.errno == number
        assert ("bytes free" in str(raised.value)) == (number != errno.EIO)
        with pytest.raises(ValueError, match="expected every tensor to be written"):
            writer.finish()


def test_an_error_of_the_disk_at_sync_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardedWriter(tmp_path, [_plan(1)]) as writer:
        writer.create()
        writer.write("a", torch.zeros(1, _MIB, dtype=torch.uint8))
        synced: list[int] = []

        def broken(descriptor: int) -> None:
            synced.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", broken)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                writer.sync(["a"])
        assert len(synced) == 2


def test_the_largest_file_allowed(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MIB, _MIB))
        with pytest.raises(OSError, match=r"too little room: File too large; \d+ bytes needed"):
            ShardedWriter(tmp_path / "out", [_plan(2)]).create()
        assert os.listdir(tmp_path / "out") == []

    assert in_a_child(limited) == 0


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path / "out")

    def write() -> None:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        with pytest.raises(PermissionError, match=r"model.safetensors.partial"):
            ShardedWriter(".", [_plan(1)]).create()

    assert in_a_child(write) == 0
    assert not partial_directory(tmp_path / "out").exists()
