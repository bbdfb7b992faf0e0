"""Kill -9 at many instants of a calibration: nothing that looks finished is left, and going on ends the same."""

from __future__ import annotations

import os
import signal

import pytest
import tiny_models
from checkpoint_files import in_a_child

from hpa_ext.calibrating import calibrate_checkpoint
from hpa_ext.checkpoints.gram_file import GramFile

_CALLS = ("pwrite", "rename", "unlink", "fsync", "fdatasync", "mkdir", "ftruncate", "rmdir")
"""The system calls through which Python changes the disk here."""


def _counted(limit=None):
    """Count the calls from now on; the process is killed before the one of this number."""
    count = [0]

    def wrap(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in _CALLS:
        wrap(name)
    return count


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_killed_anywhere(tmp_path, mode):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model")
    batches = tiny_models.batches(model, count=2, tokens=12)

    def run(name):
        return calibrate_checkpoint(
            tmp_path / "model", batches, tmp_path / name, mode=mode, gram_memory=1, resume=True, progress=False
        )

    def straight():
        count = _counted()
        run("straight.safetensors")
        (tmp_path / "count").write_text(str(count[0]))

    def killed(number):
        _counted(number)
        run("g.safetensors")

    assert in_a_child(straight) == 0
    expected, total = (tmp_path / "straight.safetensors").read_bytes(), int((tmp_path / "count").read_text())
    out = tmp_path / "g.safetensors"
    for number in range(2, total + 1, max(1, total // 8)):
        assert in_a_child(lambda number=number: killed(number)) == -signal.SIGKILL
        assert not out.exists() or out.read_bytes() == expected
        assert in_a_child(lambda: run("g.safetensors")) == 0
        assert out.read_bytes() == expected and not (tmp_path / "g.safetensors.partial").exists()
        assert list(GramFile(out).problems()) == []
        out.unlink()
