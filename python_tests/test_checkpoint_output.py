"""Output directories and their manifests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from checkpoint_files import contents, in_a_child, save_sharded, save_single, tensors_of
from checkpoint_run import run

from hpa_ext.checkpoints import (
    CheckpointError,
    CheckpointReader,
    Journal,
    begin_output,
    check_output,
    finished_output,
    identity,
    partial_directory,
    publish,
    read_manifest,
    write_manifest,
)

_WHO = identity("checkpoint", {"old": "ab"}, {"alpha": 0.4})


# The directory


def test_a_run_publishes_all_and_nothing_else(tmp_path: Path) -> None:
    source = save_sharded(tmp_path / "model", tensors_of())
    manifest = run(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    side = ["config.json", "hpa_manifest.json", "hpa_masks.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(weights + side)
    assert manifest == read_manifest(tmp_path / "out")
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: digest for name, digest in contents(tmp_path / "out").items() if name != "hpa_manifest.json"
    }
    assert manifest["kind"] == "checkpoint"
    assert manifest["config"] == {"factor": 2.0}
    assert manifest["created_by"].startswith("hpa_ext ")
    assert set(manifest["report"]) == set(tensors_of())
    assert manifest["inputs"] == {"old": CheckpointReader(source).fingerprint()}
    run(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")  # no times, no places in it


def test_outputs_that_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_single(tmp_path / "model", tensors_of())
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", [model])
    check_output(tmp_path / "new", [model])
    monkeypatch.chdir(tmp_path)
    check_output("new")
    with pytest.raises(FileExistsError, match=r"expected a new or empty directory, got one that holds 'config.json'"):
        check_output(model)
    with pytest.raises(FileExistsError, match="expected a new directory, got a file"):
        check_output(model / "config.json")
    with pytest.raises(FileNotFoundError, match=r"expected its parent directory to exist"):
        check_output(tmp_path / "absent" / "out")
    with pytest.raises(NotADirectoryError, match="expected its parent to be a directory"):
        check_output(model / "config.json" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"out: expected the name of a new directory, got .*a symlink"):
        check_output(tmp_path / "link")
    with pytest.raises(ValueError, match="out: expected the name of a new directory"):
        check_output("/")
    (tmp_path / "way").symlink_to(model)
    for inside in (model / "out", tmp_path / "way" / "out", tmp_path / "model" / ".." / "model" / "out"):
        with pytest.raises(ValueError, match="out: expected a directory outside the inputs"):
            check_output(inside, [model])
    (tmp_path / "closed").mkdir(mode=0o555)
    monkeypatch.chdir(tmp_path / "closed")

    def closed() -> None:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        os.getcwd = lambda: "."  # what is above may not be looked at by everybody
        with pytest.raises(PermissionError, match="expected to be allowed to write beside it"):
            check_output("out")

    assert in_a_child(closed) == 0


def test_begin(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with begin_output(out, _WHO) as journal:
        assert journal.path == partial_directory(out) / "journal.jsonl"
        with pytest.raises(CheckpointError, match="another process is working"):
            begin_output(out, _WHO, resume=True)
        journal.append("x")
    with pytest.raises(FileExistsError, match="an unfinished output is there: resume it, or remove it"):
        begin_output(out, _WHO)
    with begin_output(out, _WHO, resume=True) as journal:
        assert list(journal.finished) == ["x"]
    os.unlink(journal.path)
    (partial_directory(out) / "stray").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected journal.jsonl to resume by, got none beside 'stray'"):
        begin_output(out, _WHO, resume=True)
    (partial_directory(out) / "stray").unlink()
    begin_output(out, _WHO).close()  # an empty directory is as good as none
    begin_output(tmp_path / "second", _WHO, resume=True).close()


def test_partial_directory_is_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        partial_directory("out")
        == partial_directory("out/")
        == partial_directory("./x/../out")
        == (tmp_path / "out.partial")
    )


def _gather(out: Path) -> Journal:
    journal = begin_output(out, _WHO)
    (partial_directory(out) / "weights.bin").write_text("w")
    (partial_directory(out) / "sub").mkdir()
    (partial_directory(out) / "sub" / "template.jinja").write_text("t")
    return journal


def test_publish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = _gather(out)
    with pytest.raises(CheckpointError, match=r"expected hpa_manifest.json before publishing"):
        publish(partial_directory(out), out, journal)
    write_manifest(partial_directory(out), _WHO, {"layers": 1})
    (partial_directory(out) / "sub" / "x.partial").touch()
    with pytest.raises(CheckpointError, match=r"sub/x.partial: expected no unfinished file"):
        publish(partial_directory(out), out, journal)
    (partial_directory(out) / "sub" / "x.partial").unlink()
    out.mkdir()  # an empty directory of the user's is replaced
    publish(partial_directory(out), out, journal)
    assert set(contents(out)) == {"weights.bin", "sub/template.jinja", "hpa_manifest.json"}
    assert set(read_manifest(out)["files"]) == {"weights.bin", "sub/template.jinja"}
    assert not partial_directory(out).exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_publish_does_not_replace_what_has_appeared(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    journal = _gather(out)
    write_manifest(partial_directory(out), _WHO)
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "mine").touch()
    with pytest.raises(FileExistsError, match=r"expected nothing, .* the result is in .*out.partial"):
        publish(partial_directory(out), out, journal)
    journal.close()
    subprocess.run(["rm", "-r", str(out)], check=True)
    publish(partial_directory(out), out, begin_output(out, _WHO, resume=True))
    assert set(read_manifest(out)["files"]) == {"weights.bin", "sub/template.jinja"}


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    journal = _gather(out)
    write_manifest(partial_directory(out), _WHO)
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recording_rename(old: Path, new: Path) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    publish(partial_directory(out), out, journal)
    before = {Path(call).name for call in calls[: calls.index("rename")]}
    assert {"weights.bin", "template.jinja", "hpa_manifest.json", "sub", "out.partial"} <= before
    assert calls[calls.index("rename") + 1 :] == [str(tmp_path)]


def test_filesystems_that_do_not_sync_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = errno.EINVAL

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "fsync", fsync)
    _gather(tmp_path / "out").close()
    refused = errno.EIO
    with pytest.raises(OSError, match=r"syncing failed: Input/output error.*"):
        _gather(tmp_path / "second")


def test_finished_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finished_output(out, _WHO) is None
    journal = _gather(out)
    assert finished_output(out, _WHO) is None
    manifest = write_manifest(partial_directory(out), _WHO)
    assert finished_output(out, _WHO) is None  # the journal is still there: its run goes on with it
    journal.delete()  # killed here
    journal.close()
    other = {**_WHO, "config": {"alpha": 0.9}}
    with pytest.raises(CheckpointError, match=r"config.alpha: was 0.4, is 0.9"):
        finished_output(out, other)
    assert not out.exists()
    assert finished_output(out, _WHO) == manifest
    assert out.is_dir()
    assert finished_output(out, _WHO) == manifest
    with pytest.raises(CheckpointError, match=r"config.alpha: was 0.4, is 0.9"):
        finished_output(out, other)


# Manifests


def test_manifest_takes_known_hashes_and_refuses_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / ".hidden").write_text("h")
    manifest = write_manifest(tmp_path, _WHO, digests={"a": "known"})
    assert manifest["files"] == {"a": {"size": 1, "sha256": "known"}}
    assert write_manifest(tmp_path, _WHO)["files"]["a"]["sha256"] == hashlib.sha256(b"a").hexdigest()
    with pytest.raises(ValueError, match=r"digests: expected names of files in .*, got 'b'"):
        write_manifest(tmp_path, _WHO, digests={"b": "x"})
    (tmp_path / "c.partial").touch()
    with pytest.raises(CheckpointError, match=r"c.partial: expected no unfinished file"):
        write_manifest(tmp_path, _WHO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "expected format 1, got 2"),
        (lambda m: m.pop("inputs"), "expected the key 'inputs', got none"),
        (lambda m: m.pop("files"), "expected the key 'files', got none"),
        (lambda m: m.update(files=[]), "expected sizes and hashes by file"),
        (lambda m: m.update(files={"../a": {"size": 1, "sha256": ""}}), r"expected files inside .*, got '../a'"),
        (lambda m: m.update(files={"/a": {"size": 1, "sha256": ""}}), "expected files inside the directory, got '/a'"),
        (lambda m: m.update(files={"": {"size": 1, "sha256": ""}}), "expected files inside the directory, got ''"),
        (lambda m: m.update(files={"a": {"size": "1", "sha256": ""}}), "expected size and sha256 of 'a'"),
        (lambda m: m.update(files={"a": 1}), "expected size and sha256 of 'a'"),
    ],
)
def test_damaged_manifests(tmp_path: Path, change, message: str) -> None:
    manifest = write_manifest(tmp_path, _WHO)
    change(manifest)
    (tmp_path / "hpa_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"hpa_manifest.json: {message}"):
        read_manifest(tmp_path)
