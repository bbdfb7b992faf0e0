"""ops.low_rank_scores, low_rank_merge and low_rank_add: HPA on D = s B A without D."""

from __future__ import annotations

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
    is_native,
    lay_out,
    normal,
    outside,
    refuses,
)

from hpa_ext import ops
from hpa_ext.ops import column_scores, low_rank_add, low_rank_merge, low_rank_scores

SHAPES = [(1, 1, 1), (1, 257, 2), (257, 1, 3), (17, 65, 5), (65, 130, 16), (130, 7, 64), (101, 257, 33), (7, 17, 0)]
AXES = ["input", "output"]
FACTORS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
FACTORS += [(torch.bfloat16, torch.float32)]
SCALING = 1.375


def case(shape, dtype=torch.bfloat16, factors=FACTORS[1], device="cpu", make=normal):
    out, columns, rank = shape
    weight, a = make(out, columns, dtype=dtype, device=device), make(rank, columns, dtype=factors[0], device=device)
    b = make(out, rank, dtype=factors[1], device=device)
    return weight, a, b if make is integers else (0.1 * b).to(b.dtype)


def random_mask(shape, axis, device, share=0.3):
    return (torch.rand(shape[1] if axis == "input" else shape[0]) < share).to(device)


def exact_update(a, b, scaling=SCALING):
    return scaling * b.double() @ a.double()


def exact_merge(weight, a, b, mask, coefficient, axis="input", scaling=SCALING):
    old = weight.double()
    kept = mask[None, :] if axis == "input" else mask[:, None]
    return torch.where(kept, old, old * (1 - coefficient) + exact_update(a, b, scaling))


def rounding(a, b, scaling=SCALING):
    """How far float32 sums over the rank may be from the exact ones, element by element."""
    return 2**-24 * (a.shape[0] + 3) * abs(scaling) * (b.double().abs() @ a.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_equal_the_exact_ones(device, dtype, factors, shape):
    weight, a, b = case(shape, dtype, factors, device)
    squared, inner, norm = low_rank_scores(weight, a, b, SCALING)
    update, error, old = exact_update(a, b), rounding(a, b), weight.double()
    assert {value.dtype for value in (squared, inner, norm)} == {torch.float32}
    assert squared.shape == (shape[1],) and inner.shape == norm.shape == ()
    allowed = (2 * update.abs() * error).sum(0) + 1e-6 * update.square().sum(0) + 1e-30
    assert bool(((squared.double() - update.square().sum(0)).abs() <= allowed).all())
    size = float((update * old).abs().sum() + (error * old.abs()).sum() * 2**18)
    assert abs(float(inner) - float((update * old).sum())) <= 1e-6 * size + 1e-30
    assert float(norm) == pytest.approx(float(old.square().sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_rounds_once(device, dtype, factors, axis, shape):
    weight, a, b = case(shape, dtype, factors, device)
    mask, coefficient = random_mask(shape, axis, device), float(torch.tensor(0.137))
    merged = low_rank_merge(weight, a, b, SCALING, mask, coefficient, axis=axis)
    exact = exact_merge(weight, a, b, mask, coefficient, axis)
    assert merged.dtype == dtype and merged.is_contiguous()
    half_unit = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), torch.frexp(exact).exponent - 2)
    float32 = rounding(a, b) + 2**-23 * (weight.double().abs() + exact.abs())
    allowed = float32 + (0 if dtype == torch.float32 else half_unit)
    assert bool(((merged.double() - exact).abs() <= allowed * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("axis", AXES)
def test_integers_are_exact(device, dtype, axis):
    weight, a, b = case((37, 70, 6), dtype, device=device, make=integers)
    mask = random_mask((37, 70), axis, device)
    merged = low_rank_merge(weight, a, b, 0.5, mask, 0.5, axis=axis)
    exact = exact_merge(weight, a, b, mask, 0.5, axis, 0.5)
    assert torch.equal(merged, exact.to(dtype))
    update = exact_update(a, b, 0.5)
    for ours, expected in zip(
        low_rank_scores(weight, a, b, 0.5),
        (update.square().sum(0), (update * weight.double()).sum(), weight.double().square().sum()),
        strict=True,
    ):
        assert torch.equal(ours.double(), expected)


def test_scores_and_merge_are_those_of_the_full_weights(device):
    weight, a, b = case((130, 97, 8), torch.float64, (torch.float64, torch.float64), device)
    new = weight + exact_update(a, b)
    for ours, full in zip(low_rank_scores(weight, a, b, SCALING), column_scores(weight, new), strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-12)
    mask = random_mask((130, 97), "input", device)
    full = ops.project_merge(weight, new, mask, 0.3)
    torch.testing.assert_close(low_rank_merge(weight, a, b, SCALING, mask, 0.3), full, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("in_place", [False, True])
def test_retained_elements_are_bit_identical(device, dtype, axis, in_place):
    """For any bits at all: signalling NaN, both zeros, subnormals; and whatever A and B hold there."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(kind)
    weight = torch.randint(limits.min, limits.max + 1, (37, 131), dtype=kind).view(dtype).to(device)
    _, a, b = case((37, 131, 4), device=device)
    mask = random_mask((37, 131), axis, device, share=0.5)
    (a[:, mask] if axis == "input" else b[mask]).fill_(torch.nan)
    before = weight.clone()
    merged = low_rank_merge(weight, a, b, SCALING, mask, 0.25, weight if in_place else None, axis=axis)
    kept = mask.expand(37, 131) if axis == "input" else mask[:, None].expand(37, 131)
    assert (merged is weight) == in_place
    assert torch.equal(bits(merged)[kept], bits(before)[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_the_stored_form_merges_to_the_same_bits(device, dtype, factors, axis):
    """A gain and a masked A (or B), as a harmonized adapter has them."""
    weight, a, b = case((101, 257, 33), dtype, factors, device)
    mask = random_mask((101, 257), axis, device)
    coefficient = torch.tensor(0.137, device=device)
    merged = low_rank_merge(weight, a, b, SCALING, mask, coefficient, axis=axis)
    gain = torch.where(mask, torch.ones((), device=device), 1 - coefficient)
    masked = (a * ~mask, b) if axis == "input" else (a, b * ~mask[:, None])
    assert_same_bits(low_rank_add(weight, *masked, SCALING, gain, axis=axis), merged)
    # In float32, step by step or some rows at a time, and rounded at the end.
    total = weight.float()
    low_rank_add(total[:40], masked[0], masked[1][:40], SCALING, gain if axis == "input" else gain[:40], total[:40],
                 axis=axis)  # fmt: skip
    low_rank_add(total[40:], masked[0], masked[1][40:], SCALING, gain if axis == "input" else gain[40:], total[40:],
                 axis=axis)  # fmt: skip
    assert_same_bits(total.to(dtype), merged)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16])
def test_how_a_and_b_are_stored_does_not_matter_on_the_cpu(factors):
    """PEFT widens an adapter when it loads it; from disk it has the dtype of the file."""
    weight, a, b = case((101, 257, 33), factors=(factors, factors))
    narrow = low_rank_add(weight, a, b, SCALING)
    assert_same_bits(low_rank_add(weight, a.float(), b.float(), SCALING), narrow)
    assert_same_bits(low_rank_add(weight.mT.contiguous().mT, a, b, SCALING), narrow)
    for ours, wide in zip(
        low_rank_scores(weight, a, b, SCALING), low_rank_scores(weight, a.float(), b.float(), SCALING), strict=True
    ):
        assert_same_bits(ours, wide)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 17, 3), (17, 1, 3), (37, 70, 4)], ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_layout(device, layout, shape, axis):
    weight, a, b = case(shape, device=device, make=integers)
    mask = random_mask(shape, axis, device)
    exact = exact_merge(weight, a, b, mask, 0.5, axis, 0.5).to(weight.dtype)
    strided_mask = torch.ones(2 * len(mask), dtype=torch.bool, device=device)[::2].copy_(mask)
    views = [lay_out(t, layout) for t in (weight, a, b)]
    out = lay_out(torch.zeros_like(weight), layout)
    before = outside(out)
    assert low_rank_merge(*views, 0.5, strided_mask, 0.5, out=out, axis=axis) is out
    assert torch.equal(out, exact)
    assert_same_bits(outside(out), before)
    assert torch.equal(low_rank_merge(weight, a, b, 0.5, mask, 0.5, out=views[0], axis=axis), exact)
    for ours, plain in zip(
        low_rank_scores(lay_out(weight, layout), *views[1:], 0.5), low_rank_scores(weight, a, b, 0.5), strict=True
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 33, 65])
@pytest.mark.parametrize("offset", range(9))
def test_nothing_outside_the_result_is_written(device, dtype, columns, offset):
    weight, a, b = case((5, columns, 3), dtype, (dtype, dtype), device, make=integers)
    mask = random_mask((5, columns + 9), "input", device)[offset : offset + columns]
    out = at_offset(torch.zeros_like(weight), offset)
    before = outside(out)
    low_rank_merge(at_offset(weight, 8 - offset), at_offset(a, (3 * offset) % 8), b, 0.5, mask, 0.5, out=out)
    assert torch.equal(out, exact_merge(weight, a, b, mask, 0.5, scaling=0.5).to(dtype))
    assert_same_bits(outside(out), before)


def test_nothing_outside_an_allocation_is_written(device, monkeypatch):
    weight, a, b = case((101, 257, 7), device=device, make=integers)
    mask = random_mask((101, 257), "output", device)
    exact = exact_merge(weight, a, b, mask, 0.5, "output", 0.5).bfloat16()
    update = exact_update(a, b, 0.5).square().sum(0)
    guarded = GuardedAllocations(monkeypatch)
    assert torch.equal(low_rank_merge(weight, a, b, 0.5, mask, 0.5, axis="output"), exact)
    assert torch.equal(low_rank_scores(weight, a, b, 0.5)[0].double(), update)
    guarded.check()


def test_autograd_sees_that_a_weight_was_written(device):
    weight, a, b = case((17, 24, 2), device=device)
    mask = torch.zeros(24, dtype=torch.bool, device=device)
    for write in (
        lambda: low_rank_merge(weight, a, b, 1.0, mask, 0.5, weight),
        lambda: low_rank_add(weight, a, b, 1.0, None, weight),
    ):
        before = weight._version
        write()
        assert weight._version > before


def test_a_fresh_adapter_changes_nothing(device):
    weight, a, b = case((65, 130, 4), device=device)
    squared, inner, _ = low_rank_scores(weight, a, torch.zeros_like(b), SCALING)
    assert not squared.any() and inner == 0
    nothing = torch.zeros(130, dtype=torch.bool, device=device)
    assert torch.equal(low_rank_merge(weight, a, torch.zeros_like(b), SCALING, nothing, 0.0), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)], ids=str)
def test_weights_without_elements(device, dtype, rank, shape):
    weight, a, b = (
        torch.ones(size, dtype=dtype, device=device) for size in (shape, (rank, shape[1]), (shape[0], rank))
    )
    squared, inner, norm = ops.low_rank_scores(weight, a, b, 0.5)
    assert squared.tolist() == [0.0] * shape[1]
    assert (float(inner), float(norm)) == (0.0, 0.0)
    for axis, length in (("input", shape[1]), ("output", shape[0])):
        mask = torch.ones(length, dtype=torch.bool, device=device)
        assert ops.low_rank_merge(weight, a, b, 0.5, mask, 0.1, axis=axis).shape == shape


@pytest.mark.parametrize("where", ["weight", "a", "b"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_show_in_the_scores(device, where, value):
    weight, a, b = case((65, 130, 4), device=device)
    {"weight": weight, "a": a, "b": b}[where][1, 3] = value
    sums = low_rank_scores(weight, a, b, SCALING)
    assert not all(bool(torch.isfinite(total).all()) for total in sums)


def test_threads_change_nothing():
    if not is_native("low_rank"):
        pytest.skip("the order of torch's own sums is not under test")
    weight, a, b = case((700, 1030, 18))
    mask, before, results = random_mask((700, 1030), "input", "cpu"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*low_rank_scores(weight, a, b, SCALING), low_rank_merge(weight, a, b, SCALING, mask, 0.1)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_same_bits(ours, first)


def test_wrong_arguments_are_named():
    weight, a, b = case((4, 6, 2))
    mask = torch.zeros(6, dtype=torch.bool)
    merge = low_rank_merge
    with refuses(TypeError, "w_old"):
        low_rank_scores([1.0], a, b, 1.0)
    with refuses(TypeError, "w_old"):
        low_rank_scores(weight.int(), a, b, 1.0)
    with refuses(TypeError, "a"):
        low_rank_scores(weight, a.int(), b, 1.0)
    with refuses(ValueError, "a"):
        low_rank_scores(weight, a[:, :5], b, 1.0)
    with refuses(ValueError, "b"):
        low_rank_scores(weight, a, b[:, :1], 1.0)
    with refuses(ValueError, "b"):
        merge(weight, a, b[:3], 1.0, mask, 0.0)
    with refuses(TypeError, "scaling"):
        low_rank_scores(weight, a, b, "1")
    with refuses(TypeError, "scaling"):
        merge(weight, a, b, torch.tensor(1.0), mask, 0.0)
    with refuses(TypeError, "mask"):
        merge(weight, a, b, 1.0, mask.float(), 0.0)
    with refuses(ValueError, "mask"):
        merge(weight, a, b, 1.0, mask, 0.0, axis="output")
    with refuses(TypeError, "coefficient"):
        merge(weight, a, b, 1.0, mask, torch.zeros(2))
    with refuses(ValueError, "axis"):
        merge(weight, a, b, 1.0, mask, 0.0, axis="rows")
    with refuses(TypeError, "out"):
        merge(weight, a, b, 1.0, mask, 0.0, torch.zeros(4, 6))
    with refuses(ValueError, "out"):
        merge(weight, a, b, 1.0, mask, 0.0, torch.zeros(6, 4).bfloat16())
    with refuses(TypeError, "gain"):
        low_rank_add(weight, a, b, 1.0, torch.ones(6).bfloat16())
    with refuses(ValueError, "gain"):
        low_rank_add(weight, a, b, 1.0, torch.ones(6), axis="output")
    with refuses(TypeError, "weight"):
        low_rank_add(None, a, b, 1.0)
