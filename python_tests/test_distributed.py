"""Weights and activations that are divided among processes: 2 and 4 gloo processes on the CPU."""

from __future__ import annotations

import pytest
import torch.distributed
from process_group import check_names, judge, run_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo here"
)

MODULE = "sharded_layer_checks"


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
    judge(outcomes(2)[check])


@pytest.mark.parametrize("check", check_names(MODULE, 4))
def test_four_processes(check, outcomes):
    judge(outcomes(4)[check])
