"""Killed, interrupted or out of disk, harmonize_checkpoint leaves nothing that looks finished, and goes on later."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal

import pytest
import torch
from checkpoint_files import contents, in_a_child
from harmonize_inputs import make_inputs

import hpa_ext
from hpa_ext.checkpoints import CheckpointError, RunningDigest, room, verify_checkpoint
from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.hpa.checkpoint import estimate, harmonize_checkpoint, merge, pieces, plan_checkpoint
from hpa_ext.hpa.checkpoint.bundles import bundles
from hpa_ext.hpa.checkpoint.grams import fingerprint_of
from hpa_ext.hpa.checkpoint.progress import Interrupted


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def several_weights_together(monkeypatch):
    """These models' weights are alike in size, so that each would go through alone; what `whole` holds did so."""
    monkeypatch.setattr(merge, "bundles", lambda units: bundles(units, 1 << 20))


def run(inputs, out, new="new", **options):
    return harmonize_checkpoint(**inputs.arguments(new), out=out, progress=False, **options)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What runs without interruption write."""
    root = tmp_path_factory.mktemp("whole")
    for kind, options in KINDS.items():
        run(inputs, root / kind, **options)
    return {kind: contents(root / kind) for kind in KINDS}


KINDS = {"checkpoint": {}, "adapter": {"new": "adapter"}, "adapter-output": {"new": "adapter", "output": "adapter"}}


def die_at(kind, method, count):
    """Kill this process at the n-th call of a method."""
    calls = [0]
    original = getattr(kind, method)

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(kind, method, counted)


MOMENTS = [
    ("checkpoint", ShardedWriter, "create", 1), ("checkpoint", ShardedWriter, "write_bytes", 1),
    ("checkpoint", ShardedWriter, "write_bytes", 40), ("checkpoint", Journal, "append", 3),
    ("checkpoint", Journal, "append", 12), ("checkpoint", Journal, "append", 15),
    ("checkpoint", ShardedWriter, "finish", 1), ("checkpoint", ShardedWriter, "finish", 2),
    ("checkpoint", Journal, "delete", 1), ("adapter", Journal, "append", 14),
    ("adapter-output", Journal, "append", 14), ("adapter-output", ShardedWriter, "finish", 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "owner", "method", "count"), MOMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(inputs, whole, tmp_path, kind, owner, method, count):
    out = tmp_path / "out"

    def work():
        die_at(owner, method, count)
        run(inputs, out, **KINDS[kind])

    assert in_a_child(work) == -signal.SIGKILL
    assert not out.exists()
    if (tmp_path / "out.partial").exists():
        assert not verify_checkpoint(tmp_path / "out.partial", progress=False).ok
        with pytest.raises(FileExistsError, match="unfinished"):
            run(inputs, out, **KINDS[kind])
    run(inputs, out, resume=True, **KINDS[kind])
    assert contents(out) == whole[kind]
    assert not (tmp_path / "out.partial").exists()


def test_killed_twice_and_resumed_with_finished_layers_kept(inputs, whole, tmp_path):
    out = tmp_path / "out"
    for count in (26, 2):

        def work(count=count):
            die_at(Journal, "append", count)
            run(inputs, out, resume=True)

        assert in_a_child(work) == -signal.SIGKILL
    done = []
    original = merge.plan_modules
    try:
        merge.plan_modules = lambda job, diagonals, modules, updates: (
            done.extend(modules),
            original(job, diagonals, modules, updates),
        )[1]
        report = run(inputs, out, resume=True)
    finally:
        merge.plan_modules = original
    assert contents(out) == whole["checkpoint"]
    assert 0 < len(done) < len(report)


def test_interrupt_leaves_a_resumable_state_and_says_how(inputs, whole, tmp_path, monkeypatch):
    calls = [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(*args)

    original = merge.plan_modules
    monkeypatch.setattr(merge, "plan_modules", interrupted)
    with pytest.raises(Interrupted, match=r"out.partial.*--resume"):
        run(inputs, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    run(inputs, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole["checkpoint"]


def test_full_disk_in_the_midst_is_told_and_can_be_resumed(inputs, whole, tmp_path, monkeypatch):
    calls = [0]
    original = os.pwrite

    def full(descriptor, data, offset):
        calls[0] += 1
        if calls[0] == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        run(inputs, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    run(inputs, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole["checkpoint"]


def test_a_small_disk_is_found_out_before_the_grams_are_factored(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"too little room for \d+ files: \d+ bytes needed, 1000 bytes free"):
        run(inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 1 << 20)
    assert not plan_checkpoint(**inputs.arguments(), out=tmp_path / "out").fits


def test_resume_of_nothing_begins_and_of_a_finished_output_changes_nothing(inputs, whole, tmp_path):
    first = run(inputs, tmp_path / "out", resume=True)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(inputs, tmp_path / "out", resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert again.to_dict() == first.to_dict()
    with pytest.raises(FileExistsError):
        run(inputs, tmp_path / "out")


@pytest.fixture
def unfinished(inputs, tmp_path):
    def work():
        die_at(Journal, "append", 14)
        run(inputs, tmp_path / "out")

    assert in_a_child(work) == -signal.SIGKILL
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": hpa_ext.HPAConfig(retain_max=20.0)}, "retain_max: was 15.0, is 20.0"),
        ({"new": "adapter"}, "inputs.new"),
        ({"safety": "task"}, "inputs.safety"),
        ({"task": "safety"}, "inputs.task"),
        ({"old_adapters": "adapter"}, "inputs.old_adapters"),
        ({"modules": r".*language_model.*q_proj"}, "modules"),
        ({"old": "new"}, "inputs.old"),
    ],
    ids=str,
)
def test_resume_with_something_else_is_refused(inputs, unfinished, change, named):
    before = contents(unfinished.with_name("out.partial"))
    arguments = inputs.arguments() | {
        key: getattr(inputs, value) if key in ("new", "safety", "task", "old", "old_adapters") else value
        for key, value in change.items()
    }
    with pytest.raises((CheckpointError, ValueError), match=named):
        harmonize_checkpoint(**arguments, out=unfinished, resume=True, progress=False)
    assert contents(unfinished.with_name("out.partial")) == before


def test_resume_with_a_changed_weight_is_refused(inputs, unfinished, tmp_path):
    shard = next(path for path in sorted(inputs.new.glob("*.safetensors")))
    contents_before = shard.read_bytes()
    try:
        with open(shard, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\1" * 8)
        with pytest.raises(CheckpointError, match=r"inputs\.new"):
            run(inputs, unfinished, resume=True)
    finally:
        shard.write_bytes(contents_before)


def test_grams_in_memory_are_told_apart_by_all_their_numbers():
    torch.manual_seed(0)
    x, shared = torch.randn(50, 6), hpa_ext.Gram(6).update(torch.randn(9, 6))
    one = hpa_ext.Gram(6).update(x)
    state = one.state_dict()
    other = hpa_ext.Gram.from_state_dict(state | {"sum": state["sum"].diagonal().diag()})
    found = [fingerprint_of({"a": gram, "b": shared}, ["a", "b"]) for gram in (one, other)]
    assert found[0] != found[1] and found[0] == fingerprint_of({"a": one, "b": shared}, ["a", "b"])
    reduced = [hpa_ext.GramDiagonal.of(gram) for gram in (one, shared)]
    dead = dataclasses.replace(reduced[0], dead=~reduced[0].dead)
    assert len({fingerprint_of({"a": gram}, ["a"]) for gram in (*reduced, dead)}) == 3


def test_two_runs_on_one_output_are_refused(inputs, unfinished):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open(unfinished.with_name("out.partial") / "journal.jsonl", "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(write, b"locked")
            signal.pause()
    try:
        os.read(read, 6)
        with pytest.raises(CheckpointError, match="another process"):
            run(inputs, unfinished, resume=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(("new", "output"), [("new", "checkpoint"), ("adapter", "checkpoint"), ("adapter", "adapter")])
def test_plan_touches_nothing_and_knows_the_bytes(inputs, tmp_path, new, output):
    plan = plan_checkpoint(**inputs.arguments(new), out=tmp_path / "out", output=output)
    assert list(tmp_path.iterdir()) == []
    report = run(inputs, tmp_path / "out", new, output=output)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan.modules == len(report)
    assert plan.write_bytes == pytest.approx(written, rel=0.5)
    assert plan.fits and plan.memory_bytes > 0 and sum(plan.seconds.values()) > 0
    # Two sets, three layers: of q/k/v, o, gate/up and down; the adapter tunes q, v and down alone.
    assert plan.grams == 2 * 3 * (4 if new == "new" else 2)
    assert "to harmonize" in str(plan)


def test_plan_refuses_what_the_run_would(inputs, tmp_path):
    with pytest.raises(ValueError, match="output"):
        plan_checkpoint(**inputs.arguments(), out=tmp_path / "out", output="lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(FileExistsError):
        plan_checkpoint(**inputs.arguments(), out=tmp_path / "out")


def test_grams_that_need_float64_are_reported_alike(tmp_path):
    """A Gram of few tokens without damping does not factor in float32; the report must survive the journal."""
    inputs = make_inputs(tmp_path, dtype=torch.float32)
    config = hpa_ext.HPAConfig(damping=1e-7)
    report = run(inputs, tmp_path / "out", config=config)
    expected = hpa_ext.harmonize_model(
        inputs.models["old"], inputs.models["new"], **inputs.grams, config=config, progress=False
    )
    assert any(layer.precision_bits["safety"] == 64 for layer in report.layers.values())
    assert report.to_dict() == expected.to_dict()


def test_small_pieces_and_units_give_the_same_bytes(inputs, whole, tmp_path, monkeypatch):
    """Tensors that are copied in many pieces, and layers that are many units."""
    monkeypatch.setattr(pieces, "COPY_BYTES", 1000)
    monkeypatch.setattr(pieces, "_UNIT_BYTES", 5000)
    appended = []
    append = Journal.append
    monkeypatch.setattr(
        Journal, "append", lambda self, key, payload=None: (appended.append(key), append(self, key, payload))[1]
    )
    run(inputs, tmp_path / "out")
    assert contents(tmp_path / "out") == whole["checkpoint"]
    assert len([key for key in appended if not key.startswith("gram:")]) > 20


@pytest.mark.parametrize(
    ("owner", "method"), [(ShardedWriter, "sync"), (ShardedWriter, "write_bytes"), (RunningDigest, "advance")]
)
@pytest.mark.parametrize("from_the_end", [False, True])
def test_what_fails_in_another_thread_is_raised(inputs, whole, tmp_path, monkeypatch, owner, method, from_the_end):
    original = getattr(owner, method)
    calls = [0]

    def counting(self, *args, **kwargs):
        calls[0] += 1
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, counting)
        run(inputs, tmp_path / "counted")
    # Those that come last in the run, when nothing else is waited for; the masks are written after them.
    fatal = calls[0] - 75 if from_the_end and method == "write_bytes" else calls[0] - 3 if from_the_end else 2
    calls[0] = 0

    def failing(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == fatal:
            raise OSError(errno.EIO, "made to fail")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, failing)
        with pytest.raises(OSError, match="made to fail"):
            run(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(inputs, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole["checkpoint"]


def test_a_unit_is_on_the_disk_before_the_journal_says_so(inputs, tmp_path, monkeypatch):
    events = []
    sync, append = ShardedWriter.sync, Journal.append
    monkeypatch.setattr(ShardedWriter, "sync", lambda self, names: (events.append("sync"), sync(self, names))[1])
    monkeypatch.setattr(
        Journal, "append", lambda self, key, payload=None: (events.append(key), append(self, key, payload))[1]
    )
    run(inputs, tmp_path / "out")
    units = [i for i, event in enumerate(events) if event != "sync" and not event.startswith("gram:")]
    assert units and all(events[i - 1] == "sync" for i in units)
