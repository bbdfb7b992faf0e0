"""HPA from W_old, A and B must be HPA from W_old and W_new."""

from __future__ import annotations

import hpa_oracle
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, normal

from hpa_ext import Gram, GramPair, HPAConfig, NumericalError
from hpa_ext.hpa.low_rank import LowRankUpdate, gain_of
from hpa_ext.hpa.plan import plan_update
from hpa_ext.hpa.update import DenseUpdate

OUT, IN, RANK = 300, 96, 5


def lora(dtype=torch.float32, out=OUT, columns=IN, rank=RANK, seed=0):
    torch.manual_seed(seed)
    return LowRankUpdate(normal(out, columns, dtype=dtype), normal(rank, columns), 0.1 * normal(out, rank), 1.5)


def dense(update):
    """The same update as two full weights in float64."""
    new = update.old.double() + update.scaling * update.b.double() @ update.a.double()
    return DenseUpdate(update.old.double(), new)


def grams(columns=IN):
    torch.manual_seed(7)
    return GramPair(Gram(columns).update(normal(400, columns)), Gram(columns).update(normal(500, columns)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_equal_those_of_the_full_weights(dtype):
    update = lora(dtype)
    for ours, exact in zip(update.column_sums(), dense(update).column_sums(), strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-6)
    weights = [torch.rand(IN).double(), torch.rand(IN).double()]
    for ours, exact in zip(update.row_sums(weights), dense(update).row_sums(weights), strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["input", "output"])
@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("depth", [0.1, 1.0])
def test_merged_weight_equals_the_oracle(granularity, orthogonal, depth):
    update, pair = lora(), grams()
    config = HPAConfig(granularity=granularity, orthogonal=orthogonal)
    plan = plan_update(update, pair, depth, config)
    merged = update.merge(plan.selection, plan.coefficient, granularity)
    full = dense(update)
    expected, retained, alpha, coefficient = hpa_oracle.harmonize(
        full.old, full.new, pair.safety.matrix(), pair.task.matrix(), depth=depth, granularity=granularity,
        orthogonal=orthogonal,
    )  # fmt: skip
    assert sorted(retained) == plan.selection.retained.nonzero().flatten().tolist()
    assert float(plan.selection.alpha) == pytest.approx(alpha, rel=1e-5)
    assert float(plan.coefficient) == pytest.approx(coefficient, rel=1e-4, abs=1e-8)
    assert np.allclose(merged.double().numpy(), expected, rtol=1e-5, atol=1e-5)
    kept = plan.selection.retained
    old, new = (update.old[:, kept], merged[:, kept]) if granularity == "input" else (update.old[kept], merged[kept])
    assert_same_bits(new, old)


def test_result_is_the_gain_and_the_masked_adapter():
    update, pair = lora(torch.float64), grams()
    plan = plan_update(update, pair, 0.5, HPAConfig())
    gain = gain_of(plan.selection.retained, plan.coefficient, torch.float64)
    masked = update.a.double() * ~plan.selection.retained
    shipped = update.old * gain + update.scaling * update.b.double() @ masked
    assert torch.allclose(update.merge(plan.selection, plan.coefficient), shipped, rtol=1e-12, atol=1e-12)
    assert bool((gain[plan.selection.retained] == 1).all())


def test_negative_zeros_of_retained_columns_stay():
    update = lora(torch.bfloat16)
    update.old[:, :] = -0.0
    update.old[0] = 1
    plan = plan_update(update, grams(), 0.1, HPAConfig())
    kept = plan.selection.retained
    assert int(kept.sum()) > 0
    assert_same_bits(update.merge(plan.selection, plan.coefficient)[:, kept], update.old[:, kept])


@pytest.mark.parametrize(("out", "columns", "rank"), [(1, 1, 1), (257, 33, 40), (0, 8, 2), (8, 4, 0)])
def test_odd_shapes(out, columns, rank):
    update = lora(out=out, columns=columns, rank=rank)
    squared, inner, norm = update.column_sums()
    exact = dense(update).column_sums()
    assert torch.allclose(squared.double(), exact[0], rtol=1e-5, atol=1e-9)
    assert float(inner) == pytest.approx(float(exact[1]), rel=1e-4, abs=1e-6)
    assert float(norm) == pytest.approx(float(exact[2]), rel=1e-5)


def test_result_does_not_depend_on_the_threads():
    update, pair = lora(torch.bfloat16, out=1000, columns=512, rank=16), grams(512)
    before = torch.get_num_threads()
    try:
        merged = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plan = plan_update(update, pair, 0.5, HPAConfig())
            merged.append(update.merge(plan.selection, plan.coefficient))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(merged[1], merged[0])
    assert_same_bits(merged[2], merged[0])


@pytest.mark.parametrize(("broken", "named"), [("old", "layer_old"), ("a", "lora_A"), ("b", "lora_B")])
def test_not_finite_is_named(broken, named):
    update = lora()
    getattr(update, broken)[1, 0] = float("nan")
    with pytest.raises(NumericalError, match=named):
        plan_update(update, grams(), 0.5, HPAConfig())


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="a, b: expected"):
        LowRankUpdate(normal(4, 6), normal(2, 5), normal(4, 2), 1.0)
    with pytest.raises(ValueError, match="b: expected a floating-point matrix"):
        LowRankUpdate(normal(4, 6), normal(2, 6), torch.ones(4, 2, dtype=torch.int32), 1.0)
