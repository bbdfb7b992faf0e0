"""inverse_diagonal takes d^2 + O(d block) of scratch memory: neither the inverse nor its factor is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_MIB = 1 << 20
_SIZE = 3072

# A process of its own, not a fork: OpenMP's threads do not live on in a forked child, and torch would wait for them.
_MEASURE = """
import json, sys
from pathlib import Path
import torch
from hpa_ext import ops

size, rescued = int(sys.argv[1]), sys.argv[2] == "rescued"
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(2)
h = torch.eye(size)
if rescued:
    h[40:42, 40:42] = torch.tensor([[0.7, 0.6999], [0.6999, 0.7]])
ops.inverse_diagonal(torch.eye(64), 1e-9, assume_symmetric=True)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = peak()
report = ops.inverse_diagonal(h, 1e-9, assume_symmetric=True, return_report=True)
print(json.dumps({"grown": peak() - before, "bits": int(report.precision_bits)}))
"""


@pytest.mark.parametrize(("rescued", "squares"), [(False, 0.5), (True, 1.5)])
def test_scratch_of_inverse_diagonal(rescued: bool, squares: float) -> None:
    """In units of the matrix: L packed, half a square; after it, in float64, a whole one. And panels of 48 columns."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    words = [sys.executable, "-c", _MEASURE, str(_SIZE), "rescued" if rescued else "plain"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bits"] == (64 if rescued else 32)
    panels = 2 * 4 * 48 * _SIZE * (8 if rescued else 4)
    assert found["grown"] < squares * 4 * _SIZE**2 + panels + 8 * _MIB, f"{found['grown'] / _MIB:.0f} MiB"
