"""harmonize_checkpoint on several processes: the same bytes as on one, and no process waits for one that has failed."""

from __future__ import annotations

import datetime
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist
from checkpoint_files import contents
from harmonize_inputs import make_inputs

from hpa_ext.checkpoints import ShardedWriter, partial_directory
from hpa_ext.hpa.checkpoint import harmonize_checkpoint, merge
from hpa_ext.hpa.checkpoint.bundles import bundles
from hpa_ext.hpa.checkpoint.reduce import share
from hpa_ext.processes import Processes, torchrun_processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), shard="60KB")


def on_processes(count, directory, work):
    """Run ``work(rank)`` in forked gloo processes; what each returned or raised, as text, or its signal."""
    directory.mkdir(parents=True)
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            text = "ended early"
            try:
                torch.set_num_threads(1)  # the pool of threads has stayed in the parent
                dist.init_process_group(
                    "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=count,
                    timeout=datetime.timedelta(seconds=30),
                )  # fmt: skip
                text = str(work(rank))
                dist.destroy_process_group()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            finally:
                (directory / f"{rank}.txt").write_text(text)
                os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    files = [directory / f"{rank}.txt" for rank in range(count)]
    return [file.read_text() if file.exists() else code for file, code in zip(files, codes, strict=True)]


@pytest.mark.parametrize(
    ("count", "new", "output"), [(2, "new", "checkpoint"), (4, "new", "checkpoint"), (2, "adapter", "adapter")]
)
def test_same_bytes_as_one_process(inputs, tmp_path, monkeypatch, count, new, output):
    arguments = inputs.arguments(new) | {"output": output, "progress": False}
    expected = harmonize_checkpoint(**arguments, out=tmp_path / "one")
    monkeypatch.setattr(merge, "bundles", lambda units: bundles(units, 1 << 20))  # weights together, there one by one
    told = on_processes(
        count, tmp_path / "ranks", lambda rank: harmonize_checkpoint(**arguments, out=tmp_path / "many")
    )
    assert told == [str(expected)] * count  # every process has the whole report
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not partial_directory(tmp_path / "many").exists()


def test_every_process_gets_as_many_of_the_wide_grams():
    width = {("safety", f"{layer}.{name}"): size for layer in range(4) for name, size in (("q", 4), ("o", 4), ("d", 9))}
    parts = [share(list(width), width, rank, 3) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == sorted(width)
    wide = [sum(width[item] == 9 for item in part) for part in parts]
    assert max(wide) - min(wide) <= 1 and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_under_torchrun_each_process_has_its_own_gpu_and_waits_for_the_slowest(monkeypatch):
    told = {}
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: told.update(device=number))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: told.update(wait=timeout, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: told.update(left=True))
    with torchrun_processes():
        assert told["device"] == 1 and told["backend"] == "cpu:gloo,cuda:nccl"
        assert told["wait"] > datetime.timedelta(hours=12)
    assert told["left"]


def watched(rank, module, action):
    """Have `action` done when the process of that rank comes to a module."""
    original = merge.plan_modules

    def plan(job, diagonals, names, updates):
        if Processes.current().rank == rank and any(name.endswith(module) for name in names):
            action()
        return original(job, diagonals, names, updates)

    merge.plan_modules = plan


def test_what_fails_on_one_fails_on_all_and_can_be_resumed_on_another_number(inputs, tmp_path):
    arguments = inputs.arguments() | {"out": tmp_path / "out", "progress": False}

    def work(rank):
        def fail():
            raise ValueError("made to fail")

        watched(1, "layers.2.self_attn.q_proj", fail)
        harmonize_checkpoint(**arguments)

    told = on_processes(2, tmp_path / "ranks", work)
    assert "made to fail" in told[1] and told[1].startswith("ValueError")
    assert "process 1 of 2 failed" in told[0] and "made to fail" in told[0]
    assert not (tmp_path / "out").exists()
    harmonize_checkpoint(**arguments, resume=True)
    harmonize_checkpoint(**arguments | {"out": tmp_path / "one"})
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_killed_process_leaves_a_resumable_output(inputs, tmp_path):
    arguments = inputs.arguments() | {"out": tmp_path / "out", "progress": False}

    def work(rank):
        watched(1, "layers.2.self_attn.q_proj", lambda: os.kill(os.getpid(), signal.SIGKILL))
        harmonize_checkpoint(**arguments)

    told = on_processes(2, tmp_path / "first", work)
    assert told[1] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    told = on_processes(4, tmp_path / "second", lambda rank: len(harmonize_checkpoint(**arguments, resume=True)))
    assert told == ["21"] * 4
    harmonize_checkpoint(**arguments | {"out": tmp_path / "one"})
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_wrong_input_is_refused_on_every_process(inputs, tmp_path):
    arguments = inputs.arguments() | {"safety": tmp_path / "missing.safetensors", "out": tmp_path / "out"}
    told = on_processes(2, tmp_path / "ranks", lambda rank: harmonize_checkpoint(**arguments, progress=False))
    assert all("missing.safetensors" in text for text in told)
    assert not partial_directory(tmp_path / "out").exists()


def test_a_process_that_cannot_open_the_files_holds_up_nobody(inputs, tmp_path, monkeypatch):
    def refused(self):
        raise OSError("made to fail")

    monkeypatch.setattr(ShardedWriter, "open", refused)  # rank 0 makes the files, the others open them
    arguments = inputs.arguments() | {"out": tmp_path / "out", "progress": False}
    told = on_processes(2, tmp_path / "ranks", lambda rank: harmonize_checkpoint(**arguments))
    assert "process 1 of 2 failed: OSError: made to fail" in told[0]
    assert told[1] == "OSError: made to fail"
