"""Kill -9 at many instants of `harmonize_adapter` and of summing Gram files: complete or absent, and the same bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from checkpoint_files import contents, in_a_child
from compromise_adapters import make

from hpa_ext import CompromiseConfig, GramFile, harmonize_adapter, save_grams, verify_checkpoint
from hpa_ext.compromise import sum_gram_files

_CALLS = ("pwrite", "rename", "unlink", "fsync", "fdatasync", "mkdir", "ftruncate")
"""The system calls through which Python changes the disk here."""


def _killed_at(number, work):
    """Run work in another process, which is killed before its call of this number; whether it was."""

    def run():
        count = 0

        def wrap(original):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        for name in _CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        work()

    code = in_a_child(run)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.fixture
def files(tmp_path):
    made = make(tmp_path)
    for name, grams in (("safety", made.safety), ("task", made.task)):
        save_grams(grams, tmp_path / f"{name}.safetensors", {"name": name})
    return made, tmp_path


def test_an_adapter_goes_on_with_the_same_bytes_and_the_same_manifest(files):
    """The manifest too: modules with one input are solved together, and it must not list them as they came."""
    made, root = files

    def run(out, resume=False):
        return harmonize_adapter(
            made.adapter, root / "safety.safetensors", root / "task.safetensors", root / out,
            CompromiseConfig(budget=0.2), resume=resume, progress=False,
        )  # fmt: skip

    whole = run("whole")
    expected, number, kills = contents(root / "whole"), 1, 0
    while _killed_at(number, lambda: run("out")):
        kills += 1
        out, partial = root / "out", Path(f"{root / 'out'}.partial")
        if out.exists():
            assert contents(out) == expected
        else:
            assert not partial.exists() or not verify_checkpoint(partial, progress=False).ok
        assert run("out", resume=True).layers == whole.layers
        assert contents(out) == expected and verify_checkpoint(out, progress=False).ok and not partial.exists()
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        number += 3
    assert kills > 15 and contents(root / "out") == expected


def test_a_sum_of_gram_files_is_complete_or_absent(files):
    _, root = files
    names = [root / "safety.safetensors", root / "task.safetensors"]
    sum_gram_files(names, root / "whole.safetensors").close()
    expected, number, out = (root / "whole.safetensors").read_bytes(), 1, root / "out.safetensors"
    while _killed_at(number, lambda: sum_gram_files(names, out)):
        if not out.exists():
            with sum_gram_files(names, out) as again:  # over what the killed one left
                assert not list(again.problems())
        assert out.read_bytes() == expected
        out.unlink()
        assert not list(root.glob("*.writing"))
        number += 1
    assert number > 8 and out.read_bytes() == expected
    with GramFile(out) as written:
        assert not list(written.problems())
