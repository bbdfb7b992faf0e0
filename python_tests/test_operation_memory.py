"""inverse_diagonal takes d^2 + O(d block) of scratch memory: neither the inverse nor its factor is stored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import in_a_child

from hpa_ext import ops

_MIB = 1 << 20
_SIZE = 3072


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize(("rescued", "squares"), [(False, 0.5), (True, 1.5)])
def test_scratch_of_inverse_diagonal(rescued: bool, squares: float) -> None:
    """In units of the matrix: L packed, half a square; after it, in float64, a whole one. And panels of 48 columns."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")

    def measure() -> None:
        torch.set_num_threads(2)
        h = torch.eye(_SIZE)
        h[40:42, 40:42] = torch.tensor([[0.7, 0.6999], [0.6999, 0.7]]) if rescued else torch.eye(2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _peak_bytes()
        report = ops.inverse_diagonal(h, 1e-9, assume_symmetric=True, return_report=True)
        grown = _peak_bytes() - before
        assert int(report.precision_bits) == (64 if rescued else 32)
        panels = 2 * 4 * 48 * _SIZE * (8 if rescued else 4)
        assert grown < squares * 4 * _SIZE**2 + panels + 8 * _MIB, f"{grown / _MIB:.0f} MiB"

    assert in_a_child(measure) == 0
