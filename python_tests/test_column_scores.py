"""ops.column_scores: the sums over a pair of weights that HPA needs."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers import (
    DTYPES,
    MATRIX_LAYOUTS,
    GuardedAllocations,
    assert_accurate,
    assert_same_bits,
    at_offset,
    integers,
    lay_out,
    normal,
    refuses,
)

from hpa_ext.ops import column_scores

SHAPES = [(1, 1), (1, 257), (257, 1), (7, 17), (17, 65), (65, 130), (130, 7), (257, 257), (3, 4099), (5000, 3)]


def exact_scores(w_old, w_new):
    old = w_old.detach().double()
    update = w_new.detach().double() - old
    return update.square().sum(0), (update * old).sum(), old.square().sum()


def weight_pair(shape, dtype, device):
    """A weight and the same weight after an update of a hundredth of its size."""
    old = normal(*shape, dtype=torch.float64)
    return old.to(dtype).to(device), (old + 0.01 * normal(*shape, dtype=torch.float64)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(device, dtype, shape):
    w_old, w_new = weight_pair(shape, dtype, device)
    exact = exact_scores(w_old, w_new)
    old = w_old.float()
    update = w_new.float() - old
    of_torch = (update.square().sum(0), (update * old).sum(), old.square().sum())
    ours = column_scores(w_old, w_new)
    assert [tuple(part.shape) for part in ours] == [(shape[1],), (), ()]
    assert {part.dtype for part in ours} == {torch.float32}
    # Sums of squares are judged by themselves, the inner product by the norms of its factors.
    product_scale = (exact[0].sum() * exact[2]).sqrt()
    for part, scale in enumerate((exact[0], product_scale, exact[2])):
        assert_accurate(ours[part], exact[part], of_torch[part], scale=scale, roundings=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_summed_exactly(device, dtype, shape):
    w_old, w_new = integers(*shape, dtype=dtype, device=device), integers(*shape, dtype=dtype, device=device)
    for ours, exact in zip(column_scores(w_old, w_new), exact_scores(w_old, w_new), strict=True):
        assert torch.equal(ours.double(), exact)


def test_a_small_example():
    w_old = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w_new = torch.tensor([[2.0, 2.0], [1.0, 5.0]])
    squared_update, inner_product, old_squared_norm = column_scores(w_old, w_new)
    assert squared_update.tolist() == [5.0, 1.0]  # the update is [[1, 0], [-2, 1]]
    assert float(inner_product) == 1 - 6 + 4
    assert float(old_squared_norm) == 30


def test_float64(device):
    w_old, w_new = weight_pair((33, 17), torch.float64, device)
    for ours, exact in zip(column_scores(w_old, w_new), exact_scores(w_old, w_new), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 1)])
def test_empty(device, dtype, shape):
    weight = torch.zeros(shape, dtype=dtype, device=device)
    squared_update, inner_product, old_squared_norm = column_scores(weight, weight)
    assert squared_update.tolist() == [0.0] * shape[1]
    assert float(inner_product) == float(old_squared_norm) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("old_layout", ["contiguous", *MATRIX_LAYOUTS])
@pytest.mark.parametrize("new_layout", ["contiguous", *MATRIX_LAYOUTS])
def test_layout(device, dtype, old_layout, new_layout):
    for shape in ((1, 17), (17, 1), (37, 70)):
        w_old, w_new = integers(*shape, dtype=dtype, device=device), integers(*shape, dtype=dtype, device=device)
        ours = column_scores(lay_out(w_old, old_layout), lay_out(w_new, new_layout))
        for part, exact in zip(ours, exact_scores(w_old, w_new), strict=True):
            assert torch.equal(part.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(9))
def test_offset_views(device, dtype, offset):
    w_old, w_new = integers(19, 65, dtype=dtype, device=device), integers(19, 65, dtype=dtype, device=device)
    ours = column_scores(at_offset(w_old, offset), at_offset(w_new, 8 - offset))
    for part, exact in zip(ours, exact_scores(w_old, w_new), strict=True):
        assert torch.equal(part.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (130, 65), (3, 4099)])
def test_nothing_outside_an_allocation_is_written(device, dtype, shape, monkeypatch):
    w_old, w_new = integers(*shape, dtype=dtype, device=device), integers(*shape, dtype=dtype, device=device)
    exact = exact_scores(w_old, w_new)
    guarded = GuardedAllocations(monkeypatch)
    ours = column_scores(w_old, w_new)
    for part, expected in zip(ours, exact, strict=True):
        assert torch.equal(part.double(), expected)
    guarded.check()


def test_expanded_weights(device):
    row = integers(1, 33, device=device).expand(20, 33)
    column = integers(20, 1, device=device).expand(20, 33)
    for part, exact in zip(column_scores(row, column), exact_scores(row, column), strict=True):
        assert torch.equal(part.double(), exact)


def test_the_same_weight_twice(device):
    weight = normal(33, 65, dtype=torch.bfloat16, device=device)
    squared_update, inner_product, old_squared_norm = column_scores(weight, weight)
    assert not bool(squared_update.any())
    assert float(inner_product) == 0
    torch.testing.assert_close(old_squared_norm, weight.float().square().sum())


def test_the_update_is_not_rounded_to_the_dtype_of_the_weights(device):
    """1 and 2^-11 are bfloat16 numbers, but their difference is none."""
    w_old = torch.full((4, 3), 2.0**-11, dtype=torch.bfloat16, device=device)
    w_new = torch.ones(4, 3, dtype=torch.bfloat16, device=device)
    squared_update, inner_product, _ = column_scores(w_old, w_new)
    torch.testing.assert_close(
        squared_update, torch.full((3,), 4 * (1 - 2.0**-11) ** 2, device=device), rtol=2e-7, atol=0
    )
    torch.testing.assert_close(float(inner_product), 12 * (1 - 2.0**-11) * 2.0**-11, rtol=2e-7, atol=0)


def test_half_precision_sums_beyond_its_range(device):
    w_old = torch.full((8, 3), -30000.0, dtype=torch.float16, device=device)
    w_new = torch.full((8, 3), 30000.0, dtype=torch.float16, device=device)
    squared_update, inner_product, old_squared_norm = column_scores(w_old, w_new)
    torch.testing.assert_close(squared_update, torch.full((3,), 8 * 60000.0**2, device=device))
    torch.testing.assert_close(float(inner_product), -24 * 60000.0 * 30000.0)
    torch.testing.assert_close(float(old_squared_norm), 24 * 30000.0**2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_in_their_column(device, value):
    w_old, w_new = weight_pair((33, 65), torch.float32, device)
    w_new[20, 11] = value
    squared_update, inner_product, old_squared_norm = column_scores(w_old, w_new)
    assert (~torch.isfinite(squared_update)).nonzero().flatten().tolist() == [11]
    assert not bool(torch.isfinite(inner_product))
    assert bool(torch.isfinite(old_squared_norm))


def test_scale_equivariance(device):
    w_old, w_new = weight_pair((65, 33), torch.float32, device)
    for part, scaled in zip(column_scores(w_old, w_new), column_scores(4 * w_old, 4 * w_new), strict=True):
        assert torch.equal(16 * part, scaled)


def test_not_differentiable(device):
    w_old, w_new = weight_pair((7, 5), torch.float32, device)
    assert not any(part.requires_grad for part in column_scores(w_old.requires_grad_(), w_new.requires_grad_()))
    w_old, w_new = (torch.nn.Parameter(w.double()) for w in (w_old, w_new))
    assert not any(part.requires_grad for part in column_scores(w_old, w_new))


def test_weights_are_not_changed(device):
    w_old, w_new = weight_pair((33, 17), torch.bfloat16, device)
    before = w_old.clone(), w_new.clone()
    column_scores(w_old, w_new)
    assert_same_bits(w_old, before[0])
    assert_same_bits(w_new, before[1])


WEIGHT = torch.ones(3, 5)
BAD = {
    "w_old is a list": ({"w_old": [[1.0]]}, TypeError, "w_old"),
    "w_old is None": ({"w_old": None}, TypeError, "w_old"),
    "w_old is a layer": ({"w_old": torch.nn.Linear(5, 3)}, TypeError, "w_old"),
    "w_old is of integers": ({"w_old": WEIGHT.long()}, TypeError, "w_old"),
    "w_old is bool": ({"w_old": WEIGHT.bool()}, TypeError, "w_old"),
    "w_old is a vector": ({"w_old": WEIGHT[0]}, ValueError, "w_old"),
    "w_old is a batch": ({"w_old": WEIGHT[None]}, ValueError, "w_old"),
    "w_old is sparse": ({"w_old": WEIGHT.to_sparse()}, TypeError, "w_old"),
    "w_old is elsewhere": ({"w_old": WEIGHT.to("meta")}, ValueError, "w_new"),
    "w_new is a list": ({"w_new": [[1.0]]}, TypeError, "w_new"),
    "w_new is None": ({"w_new": None}, TypeError, "w_new"),
    "w_new is an array": ({"w_new": numpy.ones((3, 5), dtype="float32")}, TypeError, "w_new"),
    "w_new is of integers": ({"w_new": WEIGHT.int()}, TypeError, "w_new"),
    "w_new is complex": ({"w_new": WEIGHT.to(torch.complex64)}, TypeError, "w_new"),
    "w_new is of another dtype": ({"w_new": WEIGHT.bfloat16()}, TypeError, "w_new"),
    "w_new is float64": ({"w_new": WEIGHT.double()}, TypeError, "w_new"),
    "w_new is transposed": ({"w_new": WEIGHT.mT}, ValueError, "w_new"),
    "w_new is broadcastable": ({"w_new": WEIGHT[:1]}, ValueError, "w_new"),
    "w_new is a vector": ({"w_new": WEIGHT[0]}, ValueError, "w_new"),
    "w_new is sparse": ({"w_new": WEIGHT.to_sparse()}, TypeError, "w_new"),
    "w_new is elsewhere": ({"w_new": WEIGHT.to("meta")}, ValueError, "w_new"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    with refuses(exception, name):
        column_scores(**{"w_old": WEIGHT, "w_new": WEIGHT, **changed})
