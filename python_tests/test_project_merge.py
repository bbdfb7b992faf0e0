"""ops.project_merge: M w_old + (1 - M)(w_new - c w_old), in one pass."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers import (
    DTYPES,
    MATRIX_LAYOUTS,
    GuardedAllocations,
    assert_same_bits,
    at_offset,
    bits,
    integers,
    lay_out,
    normal,
    outside,
    refuses,
)

from hpa_ext.ops import column_scores, project_merge

SHAPES = [(1, 1), (1, 257), (257, 1), (7, 17), (17, 65), (65, 130), (130, 7), (257, 257), (3, 4099)]
AXES = ["input", "output"]


def exact_merge(w_old, w_new, mask, coefficient, axis="input"):
    old, new = w_old.detach().double(), w_new.detach().double()
    return torch.where(mask[None, :] if axis == "input" else mask[:, None], old, new - coefficient * old)


def random_mask(shape, axis, device, share=0.3):
    return (torch.rand(shape[1] if axis == "input" else shape[0]) < share).to(device)


def weight_pair(shape, dtype, device):
    old = normal(*shape, dtype=torch.float64)
    return old.to(dtype).to(device), (old + 0.1 * normal(*shape, dtype=torch.float64)).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(device, dtype, axis, shape):
    """One rounding to the dtype, and before that the two of float32."""
    w_old, w_new = weight_pair(shape, dtype, device)
    mask, coefficient = random_mask(shape, axis, device), float(torch.tensor(0.137))
    merged = project_merge(w_old, w_new, mask, coefficient, axis=axis)
    exact = exact_merge(w_old, w_new, mask, coefficient, axis)
    assert merged.dtype == dtype
    assert merged.is_contiguous()
    # Half the distance to the neighbours of the exact value, and float32's rounding of both terms.
    exponent = torch.frexp(exact).exponent
    half_unit = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 2)
    float32 = 2**-24 * (coefficient * w_old.double().abs() + exact.abs())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    allowed = float32 + (0 if dtype == torch.float32 else half_unit.clamp(min=smallest))
    assert bool(((merged.double() - exact).abs() <= allowed * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_nearest_even(device, dtype):
    step = torch.finfo(dtype).eps
    # 1 + k/2 steps: for odd k halfway between two numbers, of which the even one is due.
    w_old = torch.tensor([[-step / 2, -3 * step / 2, -5 * step / 2, -7 * step / 2]], dtype=dtype, device=device)
    w_new = torch.ones(1, 4, dtype=dtype, device=device)
    merged = project_merge(w_old, w_new, torch.zeros(4, dtype=torch.bool, device=device), 1.0)
    assert merged.double().tolist() == [[1.0, 1 + 2 * step, 1 + 2 * step, 1 + 4 * step]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_merged_exactly(device, dtype, axis, shape):
    w_old, w_new = integers(*shape, dtype=dtype, device=device), integers(*shape, dtype=dtype, device=device)
    mask = random_mask(shape, axis, device)
    for coefficient in (0.5, -2.0):
        merged = project_merge(w_old, w_new, mask, coefficient, axis=axis)
        assert torch.equal(merged.double(), exact_merge(w_old, w_new, mask, coefficient, axis))


def test_a_small_example():
    w_old = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w_new = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    mask = torch.tensor([True, False])
    assert project_merge(w_old, w_new, mask, 2.0).tolist() == [[1.0, 16.0], [3.0, 32.0]]
    assert project_merge(w_old, w_new, mask, 2.0, axis="output").tolist() == [[1.0, 2.0], [24.0, 32.0]]


def test_float64(device):
    w_old, w_new = weight_pair((33, 17), torch.float64, device)
    mask = random_mask((33, 17), "input", device)
    merged = project_merge(w_old, w_new, mask, 1 / 3)
    assert merged.dtype == torch.float64
    torch.testing.assert_close(merged, exact_merge(w_old, w_new, mask, 1 / 3), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_retained_elements_are_bit_identical(device, dtype, axis, shape):
    """For any bits at all: signalling NaN, both zeros, subnormals."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(kind)
    w_old = torch.randint(limits.min, limits.max + 1, shape, dtype=kind).view(dtype).to(device)
    w_new = normal(*shape, dtype=dtype, device=device)
    mask = random_mask(shape, axis, device, share=0.5)
    merged = project_merge(w_old, w_new, mask, 0.25, axis=axis)
    kept = mask.expand(shape) if axis == "input" else mask[:, None].expand(shape)
    assert torch.equal(bits(merged)[kept], bits(w_old)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_the_new_weight_is_not_used_where_the_old_is_retained(device, dtype, garbage):
    w_old, w_new = integers(33, 65, dtype=dtype, device=device), integers(33, 65, dtype=dtype, device=device)
    mask = random_mask((33, 65), "input", device)
    exact = exact_merge(w_old, w_new, mask, 0.5)
    w_new[:, mask] = garbage
    assert torch.equal(project_merge(w_old, w_new, mask, 0.5).double(), exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("axis", AXES)
def test_none_and_all_retained(device, dtype, axis):
    w_old, w_new = weight_pair((17, 65), dtype, device)
    length = 65 if axis == "input" else 17
    everything = torch.ones(length, dtype=torch.bool, device=device)
    assert_same_bits(project_merge(w_old, w_new, everything, 0.3, axis=axis), w_old)
    merged = project_merge(w_old, w_new, ~everything, 0.3, axis=axis)
    exact = w_new.double() - 0.3 * w_old.double()
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (3, 4099)])
def test_coefficient_zero_gives_the_new_weight(device, dtype, shape):
    w_old, w_new = weight_pair(shape, dtype, device)
    mask = random_mask(shape, "input", device)
    merged = project_merge(w_old, w_new, mask, 0)
    assert_same_bits(merged, torch.where(mask, w_old, w_new))


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_and_values_that_are_not_finite_spread_no_further(device, dtype):
    largest = torch.finfo(dtype).max
    w_old = torch.tensor([[largest, torch.inf, torch.nan, 1.0, 1.0]], dtype=dtype, device=device)
    w_new = torch.tensor([[-largest, 1.0, 1.0, torch.inf, 2.0]], dtype=dtype, device=device)
    merged = project_merge(w_old, w_new, torch.zeros(5, dtype=torch.bool, device=device), 1.0)
    torch.testing.assert_close(
        merged.float(),
        torch.tensor([[-torch.inf, -torch.inf, torch.nan, torch.inf, 1.0]], device=device),
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projected_update_is_orthogonal_to_the_old_weight(device, dtype):
    w_old, w_new = weight_pair((65, 33), dtype, device)
    _, inner_product, old_squared_norm = column_scores(w_old, w_new)
    nothing = torch.zeros(33, dtype=torch.bool, device=device)
    merged = project_merge(w_old, w_new, nothing, inner_product / old_squared_norm)
    update = merged.double() - w_old.double()
    cosine = (update * w_old.double()).sum() / (update.norm() * w_old.double().norm())
    assert abs(float(cosine)) < (1e-6 if dtype == torch.float32 else 1e-14)
    before = w_new.double() - w_old.double()
    assert abs(float((before * w_old.double()).sum() / (before.norm() * w_old.double().norm()))) > 1e-3


@pytest.mark.parametrize("kind", ["float", "int", "float32", "float64", "one element", "bfloat16", "int64", "strided"])
def test_kinds_of_coefficient(device, kind):
    w_old, w_new = weight_pair((7, 17), torch.bfloat16, device)
    mask = random_mask((7, 17), "input", device)
    coefficient = {
        "float": 2.0,
        "int": 2,
        "float32": torch.tensor(2.0),
        "float64": torch.tensor(2.0, dtype=torch.float64),
        "one element": torch.tensor([[2.0]]),
        "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
        "int64": torch.tensor(2),
        "strided": torch.tensor([1.0, 2.0, 3.0])[1],
    }[kind]
    if isinstance(coefficient, torch.Tensor):
        coefficient = coefficient.to(device)
    exact = exact_merge(w_old, w_new, mask, 2.0)
    assert torch.equal(project_merge(w_old, w_new, mask, coefficient), exact.to(torch.float32).bfloat16())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (65, 130), (3, 4099)])
@pytest.mark.parametrize("target", ["w_old", "w_new"])
@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "transposed"])
def test_out_may_be_a_weight(device, dtype, axis, shape, target, layout):
    w_old, w_new = (lay_out(weight, layout) for weight in weight_pair(shape, dtype, device))
    mask = random_mask(shape, axis, device)
    expected = project_merge(w_old, w_new, mask, 0.137, axis=axis)
    out = w_old if target == "w_old" else w_new
    before = outside(out)
    assert project_merge(w_old, w_new, mask, 0.137, out=out, axis=axis) is out
    assert_same_bits(out, expected)
    assert_same_bits(outside(out), before)


def test_all_three_may_be_one(device):
    weight = integers(17, 65, device=device)
    mask = random_mask((17, 65), "input", device)
    expected = exact_merge(weight, weight, mask, 0.5)
    assert torch.equal(project_merge(weight, weight, mask, 0.5, out=weight).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 17), (17, 1), (37, 70)])
@pytest.mark.parametrize("axis", AXES)
def test_layout(device, dtype, layout, shape, axis):
    w_old, w_new = integers(*shape, dtype=dtype, device=device), integers(*shape, dtype=dtype, device=device)
    mask = random_mask(shape, axis, device)
    exact = exact_merge(w_old, w_new, mask, 0.5, axis)
    strided_mask = torch.ones(2 * len(mask), dtype=torch.bool, device=device)[::2].copy_(mask)
    old_view, new_view = lay_out(w_old, layout), lay_out(w_new, layout)
    assert torch.equal(project_merge(old_view, w_new, mask, 0.5, axis=axis).double(), exact)
    assert torch.equal(project_merge(w_old, new_view, strided_mask, 0.5, axis=axis).double(), exact)
    out = lay_out(torch.zeros_like(w_old), layout)
    before = outside(out)
    assert project_merge(old_view, new_view, strided_mask, 0.5, out=out, axis=axis) is out
    assert torch.equal(out.double(), exact)
    assert_same_bits(outside(out), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 65])
@pytest.mark.parametrize("offset", range(9))
def test_nothing_outside_the_result_is_written(device, dtype, columns, offset):
    w_old, w_new = (integers(5, columns, dtype=dtype, device=device) for _ in range(2))
    mask = random_mask((5, columns + 9), "input", device)[offset : offset + columns]
    out = at_offset(torch.zeros_like(w_old), offset)
    before = outside(out)
    project_merge(at_offset(w_old, 8 - offset), at_offset(w_new, (3 * offset) % 8), mask, 0.5, out=out)
    assert torch.equal(out.double(), exact_merge(w_old, w_new, mask, 0.5))
    assert_same_bits(outside(out), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 17), (257, 257)])
def test_nothing_outside_an_allocation_is_written(device, dtype, shape, monkeypatch):
    w_old, w_new = (integers(*shape, dtype=dtype, device=device) for _ in range(2))
    mask = random_mask(shape, "output", device)
    exact = exact_merge(w_old, w_new, mask, 0.5, "output")
    guarded = GuardedAllocations(monkeypatch)
    assert torch.equal(project_merge(w_old, w_new, mask, 0.5, axis="output").double(), exact)
    guarded.check()


def test_large(device):
    """Large enough to be split over threads, and to be written past the caches."""
    w_old, w_new = (integers(1030, 2051, dtype=torch.bfloat16, device=device) for _ in range(2))
    for axis in AXES:
        mask = random_mask((1030, 2051), axis, device)
        merged = project_merge(w_old, w_new, mask, 0.5, axis=axis)
        assert torch.equal(merged.double(), exact_merge(w_old, w_new, mask, 0.5, axis))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty(device, dtype, axis, shape):
    weight = torch.zeros(shape, dtype=dtype, device=device)
    mask = random_mask(shape, axis, device)
    assert project_merge(weight, weight, mask, 0.5, axis=axis).shape == shape
    out = torch.zeros(shape, dtype=dtype, device=device)
    assert project_merge(weight, weight, mask, 0.5, out=out, axis=axis) is out


def test_not_differentiable(device):
    w_old, w_new = (torch.nn.Parameter(w) for w in weight_pair((7, 5), torch.float32, device))
    mask = random_mask((7, 5), "input", device)
    coefficient = torch.tensor(0.5, device=device, requires_grad=True)
    assert not project_merge(w_old, w_new, mask, coefficient).requires_grad
    out = torch.nn.Parameter(torch.zeros(7, 5, device=device))
    assert project_merge(w_old, w_new, mask, coefficient, out=out) is out
    assert out.grad_fn is None
    assert out.is_leaf
    assert torch.equal(out.detach(), project_merge(w_old, w_new, mask, coefficient))


def test_arguments_are_not_changed(device):
    w_old, w_new = weight_pair((33, 17), torch.bfloat16, device)
    mask, coefficient = random_mask((33, 17), "input", device), torch.tensor(0.3, device=device)
    arguments = (w_old, w_new, mask, coefficient)
    before = [argument.clone() for argument in arguments]
    project_merge(*arguments)
    for now, then in zip(arguments, before, strict=True):
        assert_same_bits(now, then)


WEIGHT = torch.ones(3, 5)
MASK = torch.ones(5, dtype=torch.bool)
BAD = {
    "w_old is a list": ({"w_old": [[1.0]]}, TypeError, "w_old"),
    "w_old is None": ({"w_old": None}, TypeError, "w_old"),
    "w_old is of integers": ({"w_old": WEIGHT.long()}, TypeError, "w_old"),
    "w_old is a vector": ({"w_old": WEIGHT[0]}, ValueError, "w_old"),
    "w_old is sparse": ({"w_old": WEIGHT.to_sparse()}, TypeError, "w_old"),
    "w_new is an array": ({"w_new": numpy.ones((3, 5), dtype="float32")}, TypeError, "w_new"),
    "w_new is of another dtype": ({"w_new": WEIGHT.half()}, TypeError, "w_new"),
    "w_new is broadcastable": ({"w_new": WEIGHT[:1]}, ValueError, "w_new"),
    "w_new is sparse": ({"w_new": WEIGHT.to_sparse()}, TypeError, "w_new"),
    "w_new is elsewhere": ({"w_new": WEIGHT.to("meta")}, ValueError, "w_new"),
    "mask is a list": ({"mask": [True] * 5}, TypeError, "mask"),
    "mask is None": ({"mask": None}, TypeError, "mask"),
    "mask is an array": ({"mask": numpy.ones(5, dtype=bool)}, TypeError, "mask"),
    "mask is of floats": ({"mask": MASK.float()}, TypeError, "mask"),
    "mask is of integers": ({"mask": MASK.long()}, TypeError, "mask"),
    "mask is uint8": ({"mask": MASK.byte()}, TypeError, "mask"),
    "mask is a matrix": ({"mask": MASK.expand(3, 5)}, ValueError, "mask"),
    "mask is a scalar": ({"mask": MASK[0]}, ValueError, "mask"),
    "mask is of the other axis": ({"mask": MASK[:3]}, ValueError, "mask"),
    "mask is of the input": ({"axis": "output"}, ValueError, "mask"),
    "mask is sparse": ({"mask": MASK.to_sparse()}, TypeError, "mask"),
    "mask is elsewhere": ({"mask": MASK.to("meta")}, ValueError, "mask"),
    "coefficient is a string": ({"coefficient": "0.5"}, TypeError, "coefficient"),
    "coefficient is None": ({"coefficient": None}, TypeError, "coefficient"),
    "coefficient is a bool": ({"coefficient": True}, TypeError, "coefficient"),
    "coefficient is complex": ({"coefficient": 1j}, TypeError, "coefficient"),
    "coefficient is a list": ({"coefficient": [0.5]}, TypeError, "coefficient"),
    "coefficient has two elements": ({"coefficient": torch.ones(2)}, TypeError, "coefficient"),
    "coefficient has none": ({"coefficient": torch.ones(0)}, TypeError, "coefficient"),
    "coefficient is elsewhere": ({"coefficient": torch.ones((), device="meta")}, ValueError, "coefficient"),
    "out is a list": ({"out": [[1.0]]}, TypeError, "out"),
    "out is an array": ({"out": numpy.ones((3, 5), dtype="float32")}, TypeError, "out"),
    "out is of another dtype": ({"out": WEIGHT.bfloat16()}, TypeError, "out"),
    "out is float64": ({"out": WEIGHT.double()}, TypeError, "out"),
    "out is transposed": ({"out": torch.ones(5, 3)}, ValueError, "out"),
    "out is too large": ({"out": torch.ones(3, 6)}, ValueError, "out"),
    "out is a vector": ({"out": torch.ones(15)}, ValueError, "out"),
    "out is sparse": ({"out": WEIGHT.to_sparse()}, TypeError, "out"),
    "out is elsewhere": ({"out": WEIGHT.to("meta")}, ValueError, "out"),
    "axis is unknown": ({"axis": "rows"}, ValueError, "axis"),
    "axis is a number": ({"axis": 1}, ValueError, "axis"),
    "axis is None": ({"axis": None}, ValueError, "axis"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    out = torch.full((3, 5), 7.0)
    arguments = {"w_old": WEIGHT, "w_new": WEIGHT, "mask": MASK, "coefficient": 0.5, "out": out, **changed}
    with refuses(exception, name):
        project_merge(**arguments)
    assert torch.equal(out, torch.full((3, 5), 7.0))
