"""ops.column_mask_list: each layer as alone; exact counts; ties to the lower index."""

from __future__ import annotations

import pytest
import torch
from helpers import GuardedAllocations, lay_out, normal, refuses

from hpa_ext.ops import column_mask, column_mask_list

SIZES = [1, 7, 0, 513, 64, 3001]


def score_list(device, dtype=torch.float32, sizes=SIZES):
    """Every other layer full of ties."""
    scores = [normal(n, dtype=dtype, device=device) for n in sizes]
    return [s if i % 2 else s.round() for i, s in enumerate(scores)]


def assert_as_alone(scores, counts, eligible=None):
    masks = column_mask_list(scores, counts, eligible)
    assert len(masks) == len(scores)
    for i, (mask, s, count) in enumerate(zip(masks, scores, counts, strict=True)):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, column_mask(s, count, None if eligible is None else eligible[i])), i
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_layer_is_as_alone(device, dtype):
    scores = score_list(device, dtype)
    masks = assert_as_alone(scores, [0, 3, 0, 100, 64, 10**30])
    assert [int(mask.sum()) for mask in masks] == [0, 3, 0, 100, 64, 3001]


def test_counts_on_the_device(device):
    scores = score_list(device)
    counts = [torch.tensor(n, device=device) for n in (1, 9, 2, 100, -4, 5)]
    masks = assert_as_alone(scores, counts)
    assert [int(mask.sum()) for mask in masks] == [1, 7, 0, 100, 0, 5]
    assert_as_alone(scores, [1, counts[1], 0, counts[3], 3, counts[5]])


def test_eligible_columns(device):
    scores = score_list(device)
    eligible = [s > 0 if i % 2 else None for i, s in enumerate(scores)]
    assert_as_alone(scores, [1, 7, 0, 513, 3, 2000], eligible)


def test_ties_go_to_the_lower_index(device):
    masks = column_mask_list([torch.zeros(600, device=device), torch.ones(5, device=device)], [3, 2])
    assert masks[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert masks[1].tolist() == [True, True, False, False, False]


def test_strided_scores(device):
    scores = [lay_out(normal(1, n, device=device), "every_other_column")[0] for n in (7, 513)]
    assert_as_alone(scores, [2, 100], [lay_out((s > 0)[None], "every_other_column")[0] for s in scores])


def test_three_hundred_layers(device):
    scores = score_list(device, sizes=[1 + i % 7 for i in range(300)])
    assert_as_alone(scores, [i % 5 for i in range(300)])


def test_empty_list():
    assert column_mask_list([], []) == [] == column_mask_list([], [], [])


def test_nothing_outside_an_allocation_is_written(device, monkeypatch):
    guarded = GuardedAllocations(monkeypatch)
    column_mask_list(score_list(device), [0, 3, 0, 100, 64, 3001])
    guarded.check()


SCORES = [torch.arange(4.0), torch.arange(3.0)]
BAD = {
    "scores is a tensor": ({"scores": torch.ones(2, 4)}, TypeError, "scores"),
    "scores of integers": ({"scores": [SCORES[0], SCORES[1].int()]}, TypeError, "scores[1]"),
    "scores in half precision": ({"scores": [SCORES[0].half(), SCORES[1]]}, TypeError, "scores[0]"),
    "a batch": ({"scores": [SCORES[0], SCORES[1][None]]}, ValueError, "scores[1]"),
    "float64 in some": ({"scores": [SCORES[0], SCORES[1].double()]}, TypeError, "scores[1]"),
    "no scores": ({"scores": [SCORES[0], None]}, TypeError, "scores[1]"),
    "elsewhere": ({"scores": [SCORES[0], SCORES[1].to("meta")]}, ValueError, "scores[1]"),
    "counts is a number": ({"counts": 3}, TypeError, "counts"),
    "counts is a tensor": ({"counts": torch.tensor([1, 2])}, TypeError, "counts"),
    "one count too few": ({"counts": [1]}, ValueError, "counts"),
    "a negative count": ({"counts": [1, -1]}, ValueError, "counts[1]"),
    "a count of True": ({"counts": [True, 1]}, TypeError, "counts[0]"),
    "a fractional count": ({"counts": [1, 1.0]}, TypeError, "counts[1]"),
    "a count of floats": ({"counts": [1, torch.tensor(1.0)]}, TypeError, "counts[1]"),
    "a count of int32": ({"counts": [1, torch.tensor(1, dtype=torch.int32)]}, TypeError, "counts[1]"),
    "counts in a vector": ({"counts": [1, torch.tensor([1])]}, ValueError, "counts[1]"),
    "a count elsewhere": ({"counts": [torch.tensor(1, device="meta"), 1]}, ValueError, "counts[0]"),
    "eligible is a tensor": ({"eligible": torch.ones(2, 4, dtype=torch.bool)}, TypeError, "eligible"),
    "one eligible too few": ({"eligible": [None]}, ValueError, "eligible"),
    "eligible of numbers": ({"eligible": [None, torch.ones(3)]}, TypeError, "eligible[1]"),
    "eligible of another size": ({"eligible": [torch.ones(3, dtype=torch.bool), None]}, ValueError, "eligible[0]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    with refuses(exception, name):
        column_mask_list(**{"scores": SCORES, "counts": [1, 2], **changed})
