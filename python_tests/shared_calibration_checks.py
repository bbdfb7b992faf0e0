"""Checks of calibrate_checkpoint on several processes; test_shared_calibration.py starts these."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist
from process_group import on

from hpa_ext import calibrate
from hpa_ext.calibrating import calibrate_checkpoint
from hpa_ext.calibrating.store import GramStore
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.gram_diagonal import GramDiagonal

# Two sums of float32 that differ only in where they were cut.
TOLERANCE = 2e-6


def _setting(count):
    """A directory that all processes see, with a model in it, and the batches."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    directory = Path(made[0])
    model = tiny_models.llama()
    if dist.get_rank() == 0:
        model.save_pretrained(directory / "model")
    dist.barrier()
    return directory, model, tiny_models.batches(model, count=count)


def _assert_same(stored, expected):
    assert list(stored) == list(expected)
    assert {names[0] for names in stored.groups.values()} == set(expected.distinct())
    for name, gram in expected.items():
        ours, theirs = stored[name].state_dict()["sum"], gram.state_dict()["sum"]
        assert stored[name].token_count == gram.token_count
        assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.diagonal().max()), name


def _run(directory, batches, name, **options):
    return calibrate_checkpoint(directory / "model", batches, directory / name, **{"progress": False, **options})


def _is_one_process(count):
    directory, model, batches = _setting(count)
    expected = calibrate(model, batches, progress=False)
    for mode in ("whole", "layers"):
        _assert_same(_run(directory, batches, f"{mode}.safetensors", mode=mode, gram_memory=1), expected)
    dist.barrier()
    both = [(directory / f"{mode}.safetensors").read_bytes() for mode in ("whole", "layers")]
    assert both[0] == both[1]
    assert sorted(path.name for path in directory.iterdir()) == ["layers.safetensors", "model", "whole.safetensors"]


@on(2)
def check_two_processes_are_one():
    _is_one_process(5)


@on(4)
def check_four_processes_are_one():
    _is_one_process(6)


@on(4)
def check_processes_without_batches_take_part():
    directory, model, batches = _setting(2)
    expected = calibrate(model, batches, progress=False)
    _assert_same(_run(directory, batches, "g.safetensors", mode="layers"), expected)


@on(2)
def check_inverses_are_divided():
    directory, model, batches = _setting(4)
    taken = []
    of = GramDiagonal.of.__func__
    GramDiagonal.of = classmethod(lambda cls, *args, **options: (taken.append(1), of(cls, *args, **options))[1])
    try:
        stored = _run(directory, batches, "g.safetensors", mode="layers", reduce="diagonal")
    finally:
        GramDiagonal.of = classmethod(of)
    assert len(taken) == 6  # of the twelve Grams
    for name, gram in calibrate(model, batches, progress=False).items():
        torch.testing.assert_close(stored[name].sum_inverse, GramDiagonal.of(gram).sum_inverse, rtol=1e-4, atol=0)


class _Failing(list):
    """Batches of which one process cannot make its second one."""

    def __getitem__(self, number):
        if isinstance(number, int) and number == 3 and dist.get_rank() == 1 and self.armed:
            raise ValueError("batch 3 is broken")
        return super().__getitem__(number)


@on(2)
def check_an_error_of_one_process_ends_all():
    directory, model, batches = _setting(4)
    for mode in ("whole", "layers"):
        failing = _Failing(batches)
        failing.armed = False
        expected = ValueError if dist.get_rank() == 1 else RuntimeError
        try:
            # Armed once the data have been looked at, so that it fails amid the work.
            add = GramStore.__init__

            def arm(store, *args, add=add, failing=failing):
                add(store, *args)
                failing.armed = True

            GramStore.__init__ = arm
            _run(directory, failing, f"{mode}.safetensors", mode=mode)
        except expected as error:
            assert "batch 3 is broken" in str(error)
            assert dist.get_rank() == 1 or "process 1 of 2" in str(error)
        else:
            raise AssertionError("nothing was raised")
        finally:
            GramStore.__init__ = add
        dist.barrier()
        assert not (directory / f"{mode}.safetensors").exists()
        failing.armed = False
        stored = _run(directory, failing, f"{mode}.safetensors", mode=mode, resume=True)
        _assert_same(stored, calibrate(model, batches, progress=False))


@on(2)
def check_an_interrupted_run_goes_on():
    directory, _, batches = _setting(4)
    _run(directory, batches, "straight.safetensors", mode="layers")
    add, taken = GramStore.add, []

    def stopping(store, key, grams):
        if len(taken) == 1:
            raise KeyboardInterrupt
        add(store, key, grams)
        taken.append(key)

    GramStore.add = stopping
    try:
        _run(directory, batches, "g.safetensors", mode="layers")
    except KeyboardInterrupt:
        pass
    finally:
        GramStore.add = add
    dist.barrier()
    _run(directory, batches, "g.safetensors", mode="layers", resume=True)
    dist.barrier()
    assert (directory / "g.safetensors").read_bytes() == (directory / "straight.safetensors").read_bytes()
    assert GramFile(directory / "g.safetensors").provenance["config"]["processes"] == 2
