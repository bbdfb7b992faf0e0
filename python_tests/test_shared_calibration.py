"""calibrate_checkpoint on 2 and 4 gloo processes: the Grams of one process, and no process that waits for nothing."""

from __future__ import annotations

import pytest
import torch.distributed
from process_group import check_names, run_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo here"
)

MODULE = "shared_calibration_checks"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    kept = {}

    def of(processes):
        if processes not in kept:
            kept[processes] = run_checks(MODULE, processes, tmp_path_factory.mktemp(f"processes{processes}"))
        return kept[processes]

    return of


@pytest.mark.parametrize("check", check_names(MODULE, 2))
def test_two_processes(check, outcomes):
    assert not outcomes(2)[check], outcomes(2)[check]


@pytest.mark.parametrize("check", check_names(MODULE, 4))
def test_four_processes(check, outcomes):
    assert not outcomes(4)[check], outcomes(4)[check]
