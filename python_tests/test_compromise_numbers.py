"""The compromise where numbers are at their limits: updates that safety does not see, singular sums, huge settings."""

from __future__ import annotations

import math

import pytest
import torch
from compromise_oracle import activations, change, gram, least_squares

import hpa_ext
from hpa_ext import CompromiseConfig
from hpa_ext.compromise.config import LARGEST
from hpa_ext.compromise.grams import read_full_grams
from hpa_ext.compromise.solution import Compromise, UpdateRows
from hpa_ext.compromise.strength import find_strength

WIDTH = 64


def solver(safety, task, earlier=(), **settings):
    grams = read_full_grams(
        (gram(safety), gram(task)), safety.shape[1], torch.device("cpu"), earlier=[gram(x) for x in earlier]
    )
    return Compromise(grams, CompromiseConfig(**settings))


def unseen(seed):
    """Safety and task activations, and rows ``[4, in]`` that the safety ones do not see but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    safety, task = (torch.randn(count, WIDTH, generator=generator) + 1 for count in (12, 400))
    null = torch.linalg.svd(safety.double())[2][12:]
    rows = torch.randn(4, WIDTH, generator=generator).double() @ null.mT @ null
    return safety, task, rows.float()


@pytest.mark.parametrize("settings", [{}, {"safety_damping": 0.0}, {"damping": 0.0}], ids=str)
@pytest.mark.parametrize("metric", [False, True])
def test_what_safety_sees_by_rounding_alone_is_not_seen(metric, settings):
    """The sign of a rounding error decided whether the update was kept, or almost all of it thrown away."""
    b = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        safety, task, rows = unseen(seed)
        update = UpdateRows.of_lora(rows, b, 0.5) if metric else UpdateRows(rows)
        solution = solver(safety, task, budget=0.1, **settings).solve(update)
        assert solution.rows is rows and solution.strength == 0 and solution.safety_left is None


def test_what_safety_sees_a_little_of_is_bounded():
    """A thousandth of what it would see of an update of this size that goes anywhere."""
    safety, task, rows = unseen(3)
    rows = rows + 3e-3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    assert 1e-6 < change(safety, rows) / change(safety, torch.randn(4, WIDTH)) < 1e-4
    solution = solver(safety, task, budget=0.1).solve(UpdateRows(rows))
    assert 0.098 < solution.safety_left <= 0.1 and change(safety, solution.rows) <= 0.101 * change(safety, rows)


def test_a_large_strength_without_damping_of_safety_still_projects():
    """Float32 Grams are not positive semidefinite to the last digit, and a large strength multiplies that. The rescue
    took the damping of the task for the safety side, and a strength of 1e6 times that restored the old weight.
    """
    rescued = 0
    for seed in range(12):
        safety, task, rows = unseen(seed)
        solution = solver(safety, task, strength=1e6, safety_damping=0.0).solve(UpdateRows(rows))
        rescued += solution.factor.rescued
        assert solution.factor.task_damping == 0.01 and solution.factor.protected_damping <= 1e-5
        assert 0.2 * rows.norm() < solution.rows.norm() < rows.norm() and solution.task_lost < 0.6
    assert rescued > 0, "none of these needed the rescue"


@pytest.mark.parametrize("rescue", ["damping", "precision"])
def test_a_factor_of_rounding_errors_is_none(rescue):
    """Where a feature is a multiple of another the last pivot is what rounding left, and may be positive."""
    left = []
    for seed in range(30):
        task = torch.randn(500, 8, generator=torch.Generator().manual_seed(seed))
        task[:, 7] = task[:, 2] / 3
        update = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        try:
            solution = solver(task[:9], task, strength=1.0, damping=0.0, rescue=rescue).solve(UpdateRows(update))
        except hpa_ext.NumericalError as error:
            assert rescue == "precision" and error.failing_minor > 0
            continue
        assert rescue == "precision" or (solution.factor.rescued and solution.rows.norm() < 2 * update.norm())
        left.append(solution.factor.cholesky.smallest_pivot)
    if rescue == "precision":
        assert 0 < len(left) < 30 and max(left) < 4e-7, "as it was asked for"
    else:
        assert len(left) == 30 and min(left) > 4e-7


@pytest.mark.parametrize("damping", [0.01, 1e-4, 1e-6])
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_features_whose_gram_has_a_condition_of_1e8(strength, damping):
    scales = torch.logspace(-2, 2, WIDTH)
    safety, task = (activations(count, WIDTH, seed) * scales for count, seed in ((12, 1), (400, 2)))
    update = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4))
    eigenvalues = torch.linalg.eigvalsh(task.double().mT @ task.double())
    assert eigenvalues[-1] / eigenvalues[0] > 1e8
    solution = solver(safety, task, strength=strength, damping=damping).solve(UpdateRows(update))
    exact = least_squares(update, safety, task, strength, damping)
    for x in (safety, task):
        assert change(x, solution.rows - exact) < 1e-9 * change(x, update)


@pytest.mark.parametrize("name", ["strength", "earlier_strength", "damping", "safety_damping"])
def test_the_largest_settings(name):
    """Torch refuses to multiply a float32 matrix by more than 3.4e38, in words that name nothing."""
    safety, task, rows = unseen(5)
    rows = rows + torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    settings = {"strength": 1.0, name: LARGEST}
    solution = solver(safety * 1e3, task, [task], **settings).solve(UpdateRows(rows))
    assert torch.isfinite(solution.rows).all()
    if name != "damping":
        assert solution.rows.norm() < 1e-6 * rows.norm()
    with pytest.raises(ValueError, match=rf"{name}: expected at most 1e\+30, got 1e\+39"):
        CompromiseConfig(**{"strength": 1.0, name: 1e39})


def test_the_search_stays_where_float32_can_follow():
    """Grams of very unlike size: strengths up to 1e12 times as large as what balances them would be looked at."""
    tried = []

    def share(strength):
        tried.append(strength)
        return 0.5

    with pytest.raises(hpa_ext.NumericalError, match="raise the damping or the budget"):
        find_strength(share, 0.1, 1e34, 0.01, scale=1e34)
    assert max(tried) <= 1.0001e37 and math.isfinite(max(tried))
    safety, task, rows = unseen(6)
    rows = rows + 1
    solution = solver(safety * 1e-9, task * 1e9, budget=0.1).solve(UpdateRows(rows))
    assert 0.098 < solution.safety_left <= 0.1


@pytest.mark.parametrize("settings", [{"strength": 0.7}, {"budget": 0.1}])
def test_the_thread_count_changes_no_bit(settings):
    safety, task = activations(40, 300, 1), activations(600, 300, 2)
    old = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    new = old + 0.1 * torch.randn(70, 300, generator=torch.Generator().manual_seed(1))
    pair, threads, results = (gram(safety), gram(task)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(hpa_ext.harmonize(old, new, pair, config=CompromiseConfig(**settings)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_small_correction_is_right_to_many_digits():
    """Not the difference of two large updates."""
    safety, task = activations(30, WIDTH, 1), activations(400, WIDTH, 2)
    update = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4))
    solution = solver(safety, task, strength=1e-5).solve(UpdateRows(update))
    exact = least_squares(update, safety, task, 1e-5) - update.double()
    error = (solution.rows.double() - update.double() - exact).norm() / exact.norm()
    assert exact.norm() < 1e-3 * update.norm() and error < 1e-3


def test_the_rows_are_those_of_the_strength_that_is_reported(monkeypatch):
    """Where the share jumps, the search ends with a strength that is not the last one it tried."""
    safety, task = activations(30, WIDTH, 1), activations(400, WIDTH, 2)
    update = UpdateRows(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4)))

    def search(share, *arguments):
        assert share(2.0) < share(1.0)
        return 2.0

    monkeypatch.setattr("hpa_ext.compromise.solution.find_strength", search)
    found = solver(safety, task, budget=0.1).solve(update)
    assert found.strength == 2.0 and found.evaluations == 2
    assert torch.equal(found.rows, solver(safety, task, strength=2.0).solve(update).rows)


def test_a_jump_ends_on_the_side_that_holds_the_budget():
    def share(strength):
        return 0.5 if strength < 3 else 0.01

    assert share(find_strength(share, 0.1, 1.0, 0.01)) == 0.01


def test_dead_columns_by_gram():
    safety, task = activations(30, WIDTH, 1, dead=(3, 8, 9)), activations(400, WIDTH, 2, dead=(3,))
    assert solver(safety, task).grams.dead_columns == {"safety": 3, "task": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_lora_has_the_rounding_of_the_adapter(dtype):
    """The checkpoint holds what the harmonized adapter and merging give, bit for bit, also where A is narrow."""
    from hpa_ext.checkpoints.lora_update import LoraUpdate, Step, apply_steps
    from hpa_ext.compromise.layer import merge_lora

    generator = torch.Generator().manual_seed(0)
    old, b = torch.randn(6, WIDTH, generator=generator), torch.randn(6, 3, generator=generator)
    a = torch.randn(3, WIDTH, generator=generator).to(dtype)
    compromise = solver(activations(30, WIDTH, 1), activations(400, WIDTH, 2), strength=0.5)
    narrow = compromise.solve(UpdateRows.of_lora(a, b.to(dtype), 2.0)).rows.to(dtype)
    merged, _ = merge_lora(compromise, old, (a, b.to(dtype), 2.0), 0, None)
    assert torch.equal(merged, apply_steps(old, [Step(None, LoraUpdate(narrow, b.to(dtype), 2.0))]))
