"""The search for a strength, on shares that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from compromise_oracle import activations, gram

import hpa_ext
from hpa_ext import CompromiseConfig, NumericalError
from hpa_ext.compromise.strength import find_strength

SHARES = {
    "one mode": lambda mu: (1 + mu) ** -2,
    "half power": lambda mu: (1 + mu) ** -0.5,
    "many modes": lambda mu: sum((1 + mu * 10.0**k) ** -2 for k in range(-6, 6)) / 12,
    "a shelf": lambda mu: 0.5 * (1 + 1e4 * mu) ** -2 + 0.5 * (1 + 1e-4 * mu) ** -2,
}


@pytest.mark.parametrize("start", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("budget", [0.999, 0.5, 0.05, 1e-4])
@pytest.mark.parametrize("name", SHARES)
def test_it_lands_just_below_the_budget(name, budget, start):
    share, count = SHARES[name], 0

    def counted(strength):
        nonlocal count
        count += 1
        return share(strength)

    found = find_strength(counted, budget, start, 0.01)
    assert 0.99 * budget <= share(found) <= budget
    assert count <= 20


def test_few_evaluations_from_near_by():
    for share in SHARES.values():
        calls = []
        found = find_strength(share, 0.05, 1.0, 0.01)
        find_strength(lambda mu, share=share, calls=calls: calls.append(mu) or share(mu), 0.05, 1.5 * found, 0.01)
        assert len(calls) <= 5


def test_a_jump_over_the_budget_ends_where_it_is_held():
    assert find_strength(lambda mu: 1.0 if mu < 3 else 0.01, 0.2, 1.0, 0.01) == pytest.approx(3, rel=1e-6)


def test_a_share_that_rises_for_a_while_still_holds_the_budget():
    def share(mu):
        return (1 + mu) ** -1 * (1 + 0.5 * math.sin(3 * math.log(mu)))

    for budget in (0.3, 0.1, 0.03):
        assert share(find_strength(share, budget, 1.0, 0.01)) <= budget


def test_a_budget_out_of_reach():
    with pytest.raises(NumericalError, match=r"budget: expected a strength that leaves a share of 0.1 .* leaves 0.5"):
        find_strength(lambda mu: 0.5 + 0.5 / (1 + mu), 0.1, 1.0, 0.01)


def test_against_the_generalised_eigendecomposition():
    """With ``H_s v = lambda H_t v`` the share is ``sum_k e_k (1 + mu lambda_k)^-2`` for all strengths at once."""
    width, damping = 16, 1e-3
    old, update = torch.randn(6, width), torch.randn(6, width)
    safety, task = gram(activations(10, width, 3)), gram(activations(80, width, 4))
    damped = []
    for one in (safety, task):
        matrix = one.matrix().double()
        damped.append(matrix + damping * matrix.diagonal().mean() * torch.eye(width, dtype=torch.float64))
    # The budget counts the safety Gram without damping, so it is given one that is damped already.
    config = CompromiseConfig(budget=0.07, damping=0.0, tolerance=1e-4)
    _, report = hpa_ext.harmonize(old, old + update, tuple(damped), config=config, return_report=True)
    lower = torch.linalg.cholesky(damped[1])
    inverse = torch.linalg.inv(lower)
    values, vectors = torch.linalg.eigh(inverse @ damped[0] @ inverse.mT)
    modes = (update.double() @ lower @ vectors).square().sum(0) * values

    def share(mu):
        return float((modes / (1 + mu * values) ** 2).sum() / modes.sum())

    assert share(report.strength) == pytest.approx(report.safety_left, rel=1e-5)
    assert 0.07 * (1 - 1e-4) <= share(report.strength) <= 0.07
