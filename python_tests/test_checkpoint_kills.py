"""Kill -9 at every instant: what is left is nothing that looks finished, or the output; and resuming ends the same."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_files import contents, in_a_child, in_memory, save_sharded, tensors_of  # noqa: F401
from checkpoint_run import run

from hpa_ext.checkpoints import CheckpointError, CheckpointReader, partial_directory, verify_checkpoint

_CALLS = ("pwrite", "posix_fallocate", "rename", "unlink", "fsync", "fdatasync", "mkdir", "ftruncate", "chmod")
"""The system calls through which Python changes the disk here."""


def _killed_at(number: int, torn: bool = False) -> Callable[[], None]:
    """Arrange that the process is killed before its call of this number; if torn, after half of its write."""
    count = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                if torn:
                    descriptor, data, offset = args
                    original(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)

    def arrange() -> None:
        for name in ("pwrite",) if torn else _CALLS:
            wrap(name)

    return arrange


def _assert_absent_or_complete(out: Path, expected: dict[str, str]) -> None:
    if out.exists():
        assert contents(out) == expected
        assert verify_checkpoint(out, progress=False).ok
    partial = partial_directory(out)
    if partial.exists():
        assert not verify_checkpoint(partial, progress=False).ok
        assert not (out.exists())


@pytest.fixture
def source_and_expected(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    source = save_sharded(tmp_path / "model", tensors_of(layers=1, width=8))
    run(source, tmp_path / "expected")
    yield source, contents(tmp_path / "expected")


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_call(tmp_path: Path, source_and_expected, torn: bool) -> None:
    source, expected = source_and_expected
    number, killed = 0, True
    while killed:
        number += 1
        out = tmp_path / f"out{number}"
        arrange = _killed_at(number, torn)
        killed = in_a_child(lambda arrange=arrange, out=out: (arrange(), run(source, out))) == -signal.SIGKILL
        _assert_absent_or_complete(out, expected)
        run(source, out, resume=True)
        assert contents(out) == expected
        assert not partial_directory(out).exists()
    assert number > (15 if torn else 50)  # every write, rename and fsync of the run had its turn


def test_killed_again_and_again(tmp_path: Path, source_and_expected) -> None:
    """Each run, resumed, gets a few calls further; in the end the bytes are the same."""
    source, expected = source_and_expected
    generator = random.Random(0)
    out, kills = tmp_path / "out", 0
    while True:
        arrange = _killed_at(generator.randint(6, 48))
        code = in_a_child(lambda arrange=arrange: (arrange(), run(source, out, resume=True)))
        _assert_absent_or_complete(out, expected)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 200
    assert kills >= 3
    assert contents(out) == expected


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """From outside, at whatever moment it is."""
    source = save_sharded(tmp_path / "model", tensors_of(layers=4, width=64))
    began = time.monotonic()
    run(source, tmp_path / "expected")
    duration = time.monotonic() - began
    expected, generator, kills = contents(tmp_path / "expected"), random.Random(0), 0
    for attempt in range(10):
        out = tmp_path / f"out{attempt}"
        pid = os.fork()
        if pid == 0:
            try:
                run(source, out)
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        _assert_absent_or_complete(out, expected)
        run(source, out, resume=True)
        assert contents(out) == expected
    assert kills >= 3


def test_resume_does_not_do_finished_work_again(tmp_path: Path, source_and_expected, monkeypatch) -> None:
    source, expected = source_and_expected
    out = tmp_path / "out"
    assert in_a_child(lambda: (_killed_at(30)(), run(source, out))) == -signal.SIGKILL
    read, again = CheckpointReader.read, []
    monkeypatch.setattr(CheckpointReader, "read", lambda self, name, *a: (again.append(name), read(self, name, *a))[1])
    run(source, out, resume=True)
    assert 0 < len(again) < len(CheckpointReader(source))
    assert contents(out) == expected
    again.clear()
    run(source, out, resume=True)  # all is done: nothing is read, nothing written
    assert not again
    assert contents(out) == expected


def test_resume_refuses_other_settings_at_every_stage(tmp_path: Path, source_and_expected) -> None:
    source, expected = source_and_expected
    stages = 0
    for number in range(8, 200, 4):
        out = tmp_path / f"out{number}"
        if in_a_child(lambda out=out, number=number: (_killed_at(number)(), run(source, out))) == 0:
            break
        with pytest.raises(CheckpointError, match=r"config.factor: was 2.0, is 3.0"):
            run(source, out, resume=True, factor=3.0)
        with pytest.raises(FileExistsError, match=r"an unfinished output is there: resume it, or remove it|holds"):
            run(source, out)
        run(source, out, resume=True)
        assert contents(out) == expected
        stages += 1
    assert stages > 5
    with pytest.raises(CheckpointError, match=r"config.factor: was 2.0, is 3.0"):
        run(source, out, resume=True, factor=3.0)


def test_another_model_is_refused(tmp_path: Path, source_and_expected) -> None:
    source, _ = source_and_expected
    out = tmp_path / "out"
    assert in_a_child(lambda: (_killed_at(30)(), run(source, out))) == -signal.SIGKILL
    save_sharded(source, tensors_of(layers=1, width=8, seed=1))
    with pytest.raises(CheckpointError, match=r'inputs.old: was "[0-9a-f]{64}", is "[0-9a-f]{64}"'):
        run(source, out, resume=True)
