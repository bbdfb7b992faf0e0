"""Models under FSDP2 (fully_shard) and DDP: 2 and 4 gloo processes on the CPU."""

from __future__ import annotations

import pytest
from process_group import check_names, judge, needs_gloo, outcomes_fixture

pytestmark = needs_gloo

MODULE = "sharded_model_checks"


outcomes = outcomes_fixture(MODULE)


@pytest.mark.parametrize("check", check_names(MODULE, 2))
def test_two_processes(check, outcomes):
    judge(outcomes(2)[check])


@pytest.mark.parametrize("check", check_names(MODULE, 4))
def test_four_processes(check, outcomes):
    judge(outcomes(4)[check])
