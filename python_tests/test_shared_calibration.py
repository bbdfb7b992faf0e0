"""calibrate_checkpoint on 2 and 4 gloo processes: the Grams of one process, and no process that waits for nothing."""

from __future__ import annotations

import pytest
from process_group import check_names, judge, needs_gloo, outcomes_fixture

pytestmark = needs_gloo

MODULE = "shared_calibration_checks"


outcomes = outcomes_fixture(MODULE)


@pytest.mark.parametrize("check", check_names(MODULE, 2))
def test_two_processes(check, outcomes):
    judge(outcomes(2)[check])


@pytest.mark.parametrize("check", check_names(MODULE, 4))
def test_four_processes(check, outcomes):
    judge(outcomes(4)[check])
