"""ops.column_mask: exactly the k highest scores, ties to the lower index."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from helpers import (
    MATRIX_LAYOUTS,
    GuardedAllocations,
    assert_same_bits,
    lay_out,
    normal,
    refuses,
)

from hpa_ext.ops import column_mask

COLUMNS = [1, 7, 17, 65, 130, 257, 5000]


def oracle(scores, count, eligible=None):
    """One row at a time, by sorting (NaN last, high before low, left before right) in plain Python."""
    columns = scores.shape[-1]
    rows = scores.detach().cpu().double().reshape(-1, columns).tolist() if columns else []
    counts = count.reshape(-1).tolist() if isinstance(count, torch.Tensor) else [count] * len(rows)
    allowed = [[True] * columns] * len(rows) if eligible is None else eligible.cpu().reshape(-1, columns).tolist()
    mask = []
    for row, row_count, row_allowed in zip(rows, counts, allowed, strict=True):
        candidates = [j for j in range(columns) if row_allowed[j]]
        candidates.sort(key=lambda j: (math.isnan(row[j]), 0.0 if math.isnan(row[j]) else -row[j], j))
        chosen = set(candidates[: max(row_count, 0)])
        mask.append([j in chosen for j in range(columns)])
    return torch.tensor(mask, dtype=torch.bool, device=scores.device).reshape(scores.shape)


def assert_mask(mask, expected):
    assert mask.dtype == torch.bool
    assert torch.equal(mask.view(torch.uint8), expected.view(torch.uint8))  # True must be the byte 1


def awkward_scores(*shape, device="cpu"):
    """Few distinct values, both zeros, both infinities, subnormals and NaN."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38])
    return values[torch.randint(len(values), shape)].to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", COLUMNS)
def test_distinct_scores(device, dtype, columns):
    scores = normal(columns, dtype=dtype, device=device)
    for count in sorted({0, 1, columns // 3, columns // 2, columns - 1, columns}):
        mask = column_mask(scores, count)
        assert int(mask.sum()) == count
        assert_mask(mask, oracle(scores, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", COLUMNS)
def test_ties_zeros_infinities_and_nan(device, dtype, columns):
    scores = awkward_scores(columns, device=device).to(dtype)
    for count in sorted({0, 1, columns // 10, columns // 4, columns // 2, 9 * columns // 10, columns - 1, columns}):
        assert_mask(column_mask(scores, count), oracle(scores, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [7, 65, 257, 5000])
@pytest.mark.parametrize("value", [0.0, -1.0, 2.5, torch.inf, -torch.inf, torch.nan])
def test_equal_scores_go_to_the_lower_index(device, dtype, columns, value):
    scores = torch.full((columns,), value, dtype=dtype, device=device)
    for count in (0, 1, columns // 2, columns - 1, columns):
        assert column_mask(scores, count).tolist() == [True] * count + [False] * (columns - count)


def test_minus_zero_equals_zero(device):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0], device=device)
    assert column_mask(scores, 2).tolist() == [True, True, False, False, False]
    assert column_mask(scores, 3).tolist() == [True, True, True, False, False]
    assert column_mask(-scores, 2).tolist() == [True, False, False, False, True]


def test_nan_ranks_below_every_number(device):
    minus_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32).item()  # 0xffc00000
    scores = torch.tensor([torch.nan, -torch.inf, minus_nan, -3e38, torch.inf], device=device)
    scores[2] = -scores[0]
    for count, expected in [(1, [4]), (2, [3, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])]:
        assert column_mask(scores, count).nonzero().flatten().tolist() == expected


def test_neighbouring_numbers_are_told_apart(device):
    """Scores that differ in their last bit alone, so a coarse histogram cannot separate them."""
    base = torch.tensor(1.0).view(torch.int32)
    order = torch.randperm(257)
    scores = (base + order.to(torch.int32)).view(torch.float32).to(device)
    for count in (1, 100, 256):
        assert_mask(column_mask(scores, count), (order >= 257 - count).to(device))
        assert_mask(column_mask(-scores, count), (order < count).to(device))


@pytest.mark.parametrize("columns", [1, 17, 257, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_eligible_columns(device, columns, share):
    scores = awkward_scores(columns, device=device)
    eligible = (torch.rand(columns) < share).to(device)
    for count in sorted({0, 1, columns // 10, columns // 2, columns}):
        mask = column_mask(scores, count, eligible)
        assert_mask(mask, oracle(scores, count, eligible))
        assert int(mask.sum()) == min(count, int(eligible.sum()))
        assert not bool((mask & ~eligible).any())


def test_eligible_nan_goes_before_what_is_not_eligible(device):
    scores = torch.tensor([5.0, torch.nan, 3.0, torch.inf], device=device)
    eligible = torch.tensor([False, True, True, False], device=device)
    assert column_mask(scores, 2, eligible).tolist() == [False, True, True, False]
    assert column_mask(scores, 1, eligible).tolist() == [False, False, True, False]


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("columns", [1, 17, 257])
def test_a_count_for_each_row(device, batch, columns):
    scores = awkward_scores(*batch, columns, device=device)
    eligible = (torch.rand(*batch, columns) < 0.7).to(device)
    counts = torch.randint(0, columns + 1, batch).to(device)
    assert_mask(column_mask(scores, counts), oracle(scores, counts))
    assert_mask(column_mask(scores, counts, eligible), oracle(scores, counts, eligible))
    assert_mask(column_mask(scores, columns // 2), oracle(scores, columns // 2))


def test_count_is_a_scalar_tensor(device):
    scores = normal(17, device=device)
    assert_mask(column_mask(scores, torch.tensor(5, device=device)), column_mask(scores, 5))


@pytest.mark.parametrize("counts", [[-1, -(2**62), 18, 2**62]])
def test_counts_are_clamped(device, counts):
    scores = normal(4, 17, device=device)
    counts = torch.tensor(counts, device=device)
    assert column_mask(scores, counts).sum(-1).tolist() == [0, 0, 17, 17]
    eligible = torch.zeros(4, 17, dtype=torch.bool, device=device)
    eligible[:, 3:5] = True
    assert column_mask(scores, counts, eligible).sum(-1).tolist() == [0, 0, 2, 2]
    assert int(column_mask(scores[0], 1000).sum()) == 17
    assert int(column_mask(scores[0], 2**63 - 1, eligible[0]).sum()) == 2


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 0), (2, 0, 5)])
def test_empty(device, shape):
    scores = torch.zeros(shape, device=device)
    eligible = torch.ones(shape, dtype=torch.bool, device=device)
    for mask in (column_mask(scores, 2), column_mask(scores, 2, eligible)):
        assert mask.shape == shape
        assert mask.dtype == torch.bool


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("eligible_layout", ["contiguous", *MATRIX_LAYOUTS])
def test_layout(device, layout, eligible_layout):
    scores, eligible = awkward_scores(6, 65, device=device), (torch.rand(6, 65) < 0.6).to(device)
    counts = torch.randint(0, 65, (6,)).to(device)
    strided_counts = torch.full((12,), 10**9, device=device)
    strided_counts[::2] = counts
    mask = column_mask(lay_out(scores, layout), strided_counts[::2], lay_out(eligible, eligible_layout))
    assert mask.is_contiguous()
    assert_mask(mask, oracle(scores, counts, eligible))


@pytest.mark.parametrize("offset", range(9))
def test_offset_views(device, offset):
    scores, eligible = awkward_scores(80, device=device), (torch.rand(80) < 0.6).to(device)
    mask = column_mask(scores[offset : offset + 65], 20, eligible[8 - offset : 73 - offset])
    assert_mask(mask, oracle(scores[offset : offset + 65], 20, eligible[8 - offset : 73 - offset]))


@pytest.mark.parametrize("columns", COLUMNS)
def test_nothing_outside_an_allocation_is_written(device, columns, monkeypatch):
    scores = awkward_scores(3, columns, device=device)
    expected = oracle(scores, columns // 2)
    guarded = GuardedAllocations(monkeypatch)
    assert_mask(column_mask(scores, columns // 2), expected)
    guarded.check()


def test_large(device):
    scores = torch.randint(0, 1000, (2, 100_000)).float().to(device)
    assert_mask(column_mask(scores, 12_345), oracle(scores, 12_345))


def test_adding_a_constant_to_the_order_changes_nothing(device):
    """The mask depends on the order of the scores alone."""
    scores = normal(257, device=device)
    assert_mask(column_mask(scores.exp(), 50), column_mask(scores, 50))
    assert_mask(column_mask(-scores, 207), ~column_mask(scores, 50))


def test_masks_grow_with_the_count(device):
    scores = awkward_scores(65, device=device)
    previous = column_mask(scores, 0)
    for count in range(1, 66):
        mask = column_mask(scores, count)
        assert int(mask.sum()) == count
        assert not bool((previous & ~mask).any())
        previous = mask


def test_not_differentiable(device):
    assert not column_mask(normal(17, device=device).requires_grad_(), 5).requires_grad


def test_arguments_are_not_changed(device):
    scores, eligible = awkward_scores(2, 65, device=device), (torch.rand(2, 65) < 0.6).to(device)
    counts = torch.tensor([3, 500], device=device)
    before = scores.clone(), counts.clone(), eligible.clone()
    column_mask(scores, counts, eligible)
    for now, then in zip((scores, counts, eligible), before, strict=True):
        assert_same_bits(now, then)


SCORES = torch.arange(6.0).reshape(2, 3)
COUNTS = torch.tensor([1, 2])
ELIGIBLE = torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "scores is a list": ({"scores": [1.0, 2.0]}, TypeError, "scores"),
    "scores is None": ({"scores": None}, TypeError, "scores"),
    "scores is an array": ({"scores": numpy.ones(3, dtype="float32")}, TypeError, "scores"),
    "scores is bfloat16": ({"scores": SCORES.bfloat16()}, TypeError, "scores"),
    "scores is float16": ({"scores": SCORES.half()}, TypeError, "scores"),
    "scores is of integers": ({"scores": SCORES.long()}, TypeError, "scores"),
    "scores is bool": ({"scores": SCORES.bool()}, TypeError, "scores"),
    "scores is a scalar": ({"scores": torch.tensor(1.0)}, ValueError, "scores"),
    "scores is sparse": ({"scores": SCORES.to_sparse()}, TypeError, "scores"),
    "scores is elsewhere": ({"scores": SCORES.to("meta")}, ValueError, "count"),
    "count is negative": ({"count": -1}, ValueError, "count"),
    "count is a float": ({"count": 2.0}, TypeError, "count"),
    "count is None": ({"count": None}, TypeError, "count"),
    "count is a bool": ({"count": True}, TypeError, "count"),
    "count is a string": ({"count": "2"}, TypeError, "count"),
    "count is a list": ({"count": [1, 2]}, TypeError, "count"),
    "count is an array": ({"count": numpy.array([1, 2])}, TypeError, "count"),
    "count is of floats": ({"count": COUNTS.float()}, TypeError, "count"),
    "count is int32": ({"count": COUNTS.int()}, TypeError, "count"),
    "count is a scalar for two rows": ({"count": COUNTS[0]}, ValueError, "count"),
    "count is too long": ({"count": torch.tensor([1, 2, 3])}, ValueError, "count"),
    "count is a matrix": ({"count": COUNTS[:, None]}, ValueError, "count"),
    "count is sparse": ({"count": COUNTS.to_sparse()}, TypeError, "count"),
    "count is elsewhere": ({"count": COUNTS.to("meta")}, ValueError, "count"),
    "eligible is a list": ({"eligible": [[True] * 3] * 2}, TypeError, "eligible"),
    "eligible is an array": ({"eligible": numpy.ones((2, 3), dtype=bool)}, TypeError, "eligible"),
    "eligible is of integers": ({"eligible": ELIGIBLE.long()}, TypeError, "eligible"),
    "eligible is uint8": ({"eligible": ELIGIBLE.byte()}, TypeError, "eligible"),
    "eligible is one row": ({"eligible": ELIGIBLE[0]}, ValueError, "eligible"),
    "eligible is broadcastable": ({"eligible": ELIGIBLE[:1]}, ValueError, "eligible"),
    "eligible is transposed": ({"eligible": ELIGIBLE.mT}, ValueError, "eligible"),
    "eligible is sparse": ({"eligible": ELIGIBLE.to_sparse()}, TypeError, "eligible"),
    "eligible is elsewhere": ({"eligible": ELIGIBLE.to("meta")}, ValueError, "eligible"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    with refuses(exception, name):
        column_mask(**{"scores": SCORES, "count": COUNTS, "eligible": ELIGIBLE, **changed})


def test_count_beyond_int64_means_all(device):
    assert column_mask(torch.rand(5, device=device), 10**30).all()
