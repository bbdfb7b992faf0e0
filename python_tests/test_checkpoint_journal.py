"""The journal: what it says is finished is finished, and nothing else is gone on with."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from checkpoint_files import in_a_child, in_memory  # noqa: F401

from hpa_ext.checkpoints import CheckpointError, Journal, identity
from hpa_ext.checkpoints.identity import differences

_IDENTITY = {"inputs": {"old": "ab", "new": "cd"}, "config": {"alpha": 0.4, "modules": ["q", "k"]}}


def _journal(tmp_path: Path, pieces: int = 3) -> Path:
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, _IDENTITY) as journal:
        for piece in range(pieces):
            journal.append(f"layer {piece}", {"α": piece / 3, "text": "a\r\nb\u2028"})
    return path


def test_resume_finds_what_was_finished(tmp_path: Path) -> None:
    path = _journal(tmp_path)
    with Journal.resume(path, _IDENTITY) as journal:
        assert list(journal.finished) == ["layer 0", "layer 1", "layer 2"]
        assert journal.finished["layer 2"] == {"α": 2 / 3, "text": "a\r\nb\u2028"}
        journal.append("layer 3")
        journal.append("layer 1", {"again": True})
    with Journal.resume(path, _IDENTITY) as journal:
        assert journal.finished["layer 3"] == {}
        assert journal.finished["layer 1"] == {"again": True}
        assert len(journal.finished) == 4


def test_any_cut_drops_the_torn_line_alone(tmp_path: Path) -> None:
    """Wherever the file ends, every whole line counts, and appending goes on from there."""
    path = _journal(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        expected = max(sum(end <= length for end in ends) - 1, 0)
        with Journal.resume(path, _IDENTITY) as journal:
            assert len(journal.finished) == expected
            journal.append("more", {"n": 1})
        with Journal.resume(path, _IDENTITY) as journal:
            assert len(journal.finished) == expected + 1


@pytest.mark.parametrize("tail", [bytes(64), b"\n\n", b"garbage\n", b"00000000 {}\n", b'12345678 {"key":"x"}\n'])
def test_a_damaged_end_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = _journal(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with Journal.resume(path, _IDENTITY) as journal:
        assert len(journal.finished) == 3
    assert path.read_bytes() == whole


def test_damage_in_the_midst_is_told(tmp_path: Path) -> None:
    path = _journal(tmp_path)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"layer 1")
    whole[start] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match=r"journal.jsonl: line 3 of 4 is damaged, and whole lines follow it"):
        Journal.resume(path, _IDENTITY)
    assert path.read_bytes() == bytes(whole)


def test_another_identity_is_refused_by_key(tmp_path: Path) -> None:
    path = _journal(tmp_path)
    before = path.read_bytes()
    other = {"inputs": {"old": "ab", "new": "XX"}, "config": {"alpha": 0.5, "modules": ["q"], "device": "cpu"}}
    with pytest.raises(CheckpointError) as raised:
        Journal.resume(path, other)
    message = str(raised.value)
    assert "got 4 differences" in message
    for line in (
        'inputs.new: was "cd", is "XX"',
        "config.alpha: was 0.4, is 0.5",
        'config.modules: was ["q", "k"], is ["q"]',
        'config.device: was (absent), is "cpu"',
    ):
        assert line in message
    assert path.read_bytes() == before
    Journal.resume(path, {**_IDENTITY, "config": {"alpha": 0.4, "modules": ("q", "k")}}).close()  # as JSON has it


def test_many_differences_are_cut_short() -> None:
    before, now = {str(i): i for i in range(30)}, {str(i): "x" * 1000 for i in range(30)}
    assert len(differences(before, now)) == 30
    assert all(len(line) < 120 for line in differences(before, now))
    assert differences({}, {}) == [] == differences(before, dict(before))
    assert differences({"a": {}}, {"a": {"b": 1}}) == ["a: was {}, is (absent)", "a.b: was (absent), is 1"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = _journal(tmp_path)

    def second() -> None:
        with pytest.raises(CheckpointError, match="another process is working on this output"):
            Journal.resume(path, _IDENTITY)

    with Journal.resume(path, _IDENTITY) as journal:
        second()  # the lock is on the open file, so it holds within a process too
        assert in_a_child(second) == 0
        journal.append("x")
    Journal.resume(path, _IDENTITY).close()
    with pytest.raises(FileExistsError):
        Journal.create(path, _IDENTITY)


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = _journal(tmp_path)
    assert in_a_child(lambda: (Journal.resume(path, _IDENTITY), os.kill(os.getpid(), 9))) == -9
    Journal.resume(path, _IDENTITY).close()


def test_an_output_that_was_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _journal(tmp_path)
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *args: (flock(*args), path.unlink(missing_ok=True)))
    with pytest.raises(CheckpointError, match="another process has just finished this output"):
        Journal.resume(path, _IDENTITY)


def test_a_line_that_cannot_be_written_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _journal(tmp_path)
    before, pwrite = path.read_bytes(), os.pwrite
    with Journal.resume(path, _IDENTITY) as journal:

        def half(descriptor: int, data: memoryview, offset: int) -> int:
            if offset == len(before):
                return pwrite(descriptor, data[:10], offset)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match=r"writing the line of 'x' failed: No space left on device; \d+ bytes to go"):
            journal.append("x", {"n": 1})
        monkeypatch.setattr(os, "pwrite", pwrite)
        assert path.read_bytes() == before
        assert "x" not in journal.finished
        journal.append("y")
    assert list(Journal.resume(path, _IDENTITY).finished)[-1] == "y"


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="journal: expected plain values for JSON"):
        Journal.create(tmp_path / "j", {"a": object()})
    assert not (tmp_path / "j").exists()
    with Journal.create(tmp_path / "j", {}) as journal:
        with pytest.raises(ValueError, match="journal: expected plain values for JSON"):
            journal.append("x", {"a": float("nan")})
        assert not journal.finished
    with pytest.raises(ValueError, match="expected an open journal"):
        journal.append("x")


def test_absent_or_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal.resume(tmp_path / "absent", {})
    with pytest.raises(IsADirectoryError):
        Journal.resume(tmp_path, {})


def test_identity_is_plain_and_complete() -> None:
    who = identity("checkpoint", {"old": "ab"}, {"modules": ("q", "k")})
    assert who == json.loads(json.dumps(who))
    assert set(who) == {"format", "kind", "inputs", "config", "versions"}
    assert {"hpa_ext", "torch", "python", "safetensors"} <= set(who["versions"])
    assert who == identity("checkpoint", {"old": "ab"}, {"modules": ["q", "k"]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        identity("checkpoint", {}, {"alpha": float("inf")})
