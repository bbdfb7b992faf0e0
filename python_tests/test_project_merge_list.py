"""ops.project_merge_list: each layer as alone, in place or not; nothing written unless all arguments are right."""

from __future__ import annotations

from random import Random

import pytest
import torch
from helpers import GuardedAllocations, assert_same_bits, normal, outside, refuses
from layer_lists import laid_out, masks_of, weight_pairs

from hpa_ext import _C
from hpa_ext.ops import column_mask_list, column_scores_list, project_merge, project_merge_list
from hpa_ext.ops._lists import Place, first_overlap

AXES = ("input", "output")


def alone(w_old, w_new, masks, coefficients, axis="input"):
    layers = zip(w_old, w_new, masks, coefficients, strict=True)
    return [project_merge(old, new, mask, c, axis=axis) for old, new, mask, c in layers]


def assert_all_same_bits(ours, expected):
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("axis", AXES)
def test_each_layer_is_as_alone(device, axis):
    w_old, w_new = weight_pairs(device)
    masks, coefficients = masks_of(w_old, axis), normal(len(w_old), device=device)
    merged = project_merge_list(w_old, w_new, masks, coefficients, axis=axis)
    assert_all_same_bits(merged, alone(w_old, w_new, masks, coefficients, axis))
    for old, mask, out in zip(w_old, masks, merged, strict=True):
        kept = (old[:, mask], out[:, mask]) if axis == "input" else (old[mask], out[mask])
        assert_same_bits(*kept)


@pytest.mark.parametrize("axis", AXES)
def test_any_layout(device, axis):
    w_old, w_new = weight_pairs(device)
    masks, coefficients = masks_of(w_old, axis), normal(2 * len(w_old), device=device)[::2]
    outs = laid_out([torch.zeros_like(w) for w in w_old])
    before = [outside(out) for out in outs]
    expected = alone(w_old, w_new, masks, coefficients, axis)
    result = project_merge_list(laid_out(w_old), laid_out(w_new[::-1])[::-1], masks, coefficients, outs, axis=axis)
    assert all(mine is out for mine, out in zip(result, outs, strict=True))
    assert_all_same_bits(outs, expected)
    assert_all_same_bits([outside(out) for out in outs], before)


@pytest.mark.parametrize("where", ["w_old", "w_new", "in turns"])
def test_in_place(device, where):
    w_old, w_new = weight_pairs(device)
    masks, coefficients = masks_of(w_old), normal(len(w_old), device=device)
    expected = alone(w_old, w_new, masks, coefficients)
    in_turns = [pair[i % 2] for i, pair in enumerate(zip(w_old, w_new, strict=True))]
    outs = {"w_old": w_old, "w_new": w_new, "in turns": in_turns}
    versions = [out._version for out in outs[where]]
    assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients, outs[where]), expected)
    grown = [out._version > version for out, version in zip(outs[where], versions, strict=True)]
    assert all(grown)


def test_float64_and_coefficients_of_another_dtype(device):
    w_old, w_new = weight_pairs(device, dtypes=[torch.float64])
    masks, coefficients = masks_of(w_old), normal(len(w_old), device=device)
    expected = alone(w_old, w_new, masks, coefficients)
    assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients), expected)
    w_old, w_new = weight_pairs(device)
    expected = alone(w_old, w_new, masks, coefficients)
    assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients.double()), expected)


def test_three_hundred_layers(device):
    w_old, w_new = weight_pairs(device, shapes=[(1 + i % 3, 1 + i % 5) for i in range(300)])
    masks, coefficients = masks_of(w_old), normal(300, device=device)
    expected = alone(w_old, w_new, masks, coefficients)
    assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients, w_new), expected)


def test_layers_beside_each_other_in_one_tensor(device):
    """Rows, and columns, of one tensor: their memory interleaves, but they share no element."""
    fused_old, fused_new = normal(12, 24, device=device), normal(12, 24, device=device)
    for dim in (0, 1):
        w_old, w_new = list(fused_old.chunk(3, dim)), list(fused_new.clone().chunk(3, dim))
        masks, coefficients = masks_of(w_old), normal(3, device=device)
        expected = alone(w_old, w_new, masks, coefficients)
        assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients, w_new), expected)


def test_weights_may_be_shared_where_nobody_writes(device):
    (old,), (new,) = weight_pairs(device, shapes=[(9, 40)])
    masks, coefficients = masks_of([old, old]), normal(2, device=device)
    expected = alone([old, old], [new, new], masks, coefficients)
    assert_all_same_bits(project_merge_list([old, old], [new, new], masks, coefficients), expected)


def test_empty_list():
    assert project_merge_list([], [], [], torch.empty(0)) == [] == project_merge_list([], [], [], torch.empty(0), [])


def test_nothing_outside_an_allocation_is_written(device, monkeypatch):
    w_old, w_new = weight_pairs(device)
    masks, coefficients = masks_of(w_old), normal(len(w_old), device=device)
    guarded = GuardedAllocations(monkeypatch)
    project_merge_list(w_old, w_new, masks, coefficients)
    guarded.check()


def test_a_graph_that_needs_the_old_values_refuses(device):
    w_old, w_new = weight_pairs(device, shapes=[(7, 5), (3, 4)], dtypes=[torch.float32])
    x = torch.ones(4, requires_grad=True, device=device)
    y = (w_new[1] * x).sum()
    project_merge_list(w_old, w_new, masks_of(w_old), torch.zeros(2, device=device), w_new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


OLD = [torch.ones(3, 5), torch.ones(2, 4).bfloat16()]
MASKS = [torch.zeros(5, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)]
COEFFICIENTS = torch.zeros(2)
BAD = {
    "w_old is a tensor": ({"w_old": torch.ones(2, 3, 5)}, TypeError, "w_old"),
    "one weight too few": ({"w_new": OLD[:1]}, ValueError, "w_new"),
    "a weight of another dtype": ({"w_new": [OLD[0], OLD[1].float()]}, TypeError, "w_new[1]"),
    "masks is None": ({"masks": None}, TypeError, "masks"),
    "one mask too few": ({"masks": MASKS[:1]}, ValueError, "masks"),
    "a mask of numbers": ({"masks": [MASKS[0], torch.zeros(4)]}, TypeError, "masks[1]"),
    "a mask of another size": ({"masks": MASKS[::-1]}, ValueError, "masks[0]"),
    "a mask of rows": ({"axis": "output"}, ValueError, "masks[0]"),
    "a mask elsewhere": ({"masks": [MASKS[0].to("meta"), MASKS[1]]}, ValueError, "masks[0]"),
    "coefficients in a list": ({"coefficients": [0.0, 0.0]}, TypeError, "coefficients"),
    "coefficients of integers": ({"coefficients": torch.zeros(2).int()}, TypeError, "coefficients"),
    "one coefficient for all": ({"coefficients": torch.zeros(())}, ValueError, "coefficients"),
    "one coefficient too many": ({"coefficients": torch.zeros(3)}, ValueError, "coefficients"),
    "coefficients elsewhere": ({"coefficients": torch.zeros(2, device="meta")}, ValueError, "coefficients"),
    "an unknown axis": ({"axis": "rows"}, ValueError, "axis"),
    "outs is a tensor": ({"outs": torch.zeros(2, 3, 5)}, TypeError, "outs"),
    "one out too few": ({"outs": [torch.zeros(3, 5)]}, ValueError, "outs"),
    "an out of another shape": ({"outs": [torch.zeros(3, 5), torch.zeros(4, 2).bfloat16()]}, ValueError, "outs[1]"),
    "an out of another dtype": ({"outs": [torch.zeros(3, 5), torch.zeros(2, 4)]}, TypeError, "outs[1]"),
    "an expanded out": (
        {"outs": [torch.zeros(3, 5), torch.zeros(1, 4).bfloat16().expand(2, 4)]},
        ValueError,
        "outs[1]",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    outs = [torch.full_like(w, 7.0) for w in OLD]
    arguments = {"w_old": OLD, "w_new": OLD, "masks": MASKS, "coefficients": COEFFICIENTS, "outs": outs, **changed}
    with refuses(exception, name):
        project_merge_list(**arguments)
    assert all(bool((out == 7).all()) for out in outs)


def test_outs_that_another_layer_uses(device):
    w_old, w_new = weight_pairs(device, shapes=[(4, 6)] * 3, dtypes=[torch.float32])
    masks, coefficients = masks_of(w_old), torch.zeros(3, device=device)
    out, wide = torch.zeros(4, 6, device=device), torch.zeros(6, 6, device=device)
    fine = [torch.zeros_like(w) for w in w_old]
    for outs, place in (
        ([out, fine[1], out], 2),
        ([w_new[1], fine[1], fine[2]], 0),
        ([fine[0], fine[1], w_old[0]], 2),
        ([wide[:4], fine[1], wide[2:]], 2),
    ):
        copies = [w.clone() for w in (*w_old, *w_new, *outs)]
        with refuses(ValueError, f"outs[{place}]"):
            project_merge_list(w_old, w_new, masks, coefficients, outs)
        assert_all_same_bits([*w_old, *w_new, *outs], copies)


INTERLEAVED = {
    "columns of a transposed tensor": lambda t: (t.mT[:, 2:8].mT, t.mT[:, 8:14].mT),
    "every other column": lambda t: (t[:, ::2], t[:, 1::2]),
    "every other row": lambda t: (t[::2], t[1::2]),
    "quarters": lambda t: (t[:6, 10:], t[6:, :10]),
    "every other column of each half": lambda t: (t[:, :10:2], t[:, 10::2]),
}


@pytest.mark.parametrize("kind", INTERLEAVED)
def test_parts_of_one_tensor_that_share_no_element(device, kind):
    outs = list(INTERLEAVED[kind](torch.zeros(20, 20, device=device)))
    w_old, w_new = weight_pairs(device, shapes=[tuple(out.shape) for out in outs], dtypes=[torch.float32])
    masks, coefficients = masks_of(w_old), normal(2, device=device)
    expected = alone(w_old, w_new, masks, coefficients)
    assert_all_same_bits(project_merge_list(w_old, w_new, masks, coefficients, outs), expected)


@pytest.mark.parametrize("seed", range(8))
def test_overlaps_are_found_as_by_counting_elements(seed):
    random = Random(seed)
    places = torch.arange(400).view(20, 20)
    for _ in range(300):
        parts = []
        for _ in range(2):
            rows, columns = (sorted(random.sample(range(21), 2)) for _ in range(2))
            steps = random.choice([(1, 1), (2, 1), (1, 2)])
            part = places[rows[0] : rows[1] : steps[0], columns[0] : columns[1] : steps[1]]
            parts.append(part.mT if random.random() < 0.3 else part)
        share = bool(set(parts[0].flatten().tolist()) & set(parts[1].flatten().tolist()))
        found = first_overlap([Place("outs", i, part, True) for i, part in enumerate(parts)], within_layers=False)
        alike = len({tuple(sorted(part.stride())) for part in parts}) == 1 and min(parts[0].shape + parts[1].shape) > 1
        assert (found is not None) >= share, "an overlap was missed"
        assert not alike or (found is not None) == share, "parts of one grid were refused"


def test_columns_of_one_tensor_that_overlap(device):
    fused = torch.zeros(4, 20, device=device)
    w_old, w_new = weight_pairs(device, shapes=[(4, 6)] * 2, dtypes=[torch.float32])
    masks, coefficients = masks_of(w_old), torch.zeros(2, device=device)
    project_merge_list(w_old, w_new, masks, coefficients, [fused[:, 2:8], fused[:, 8:14]])
    with refuses(ValueError, "outs[1]"):
        project_merge_list(w_old, w_new, masks, coefficients, [fused[:, 2:8], fused[:, 7:13]])
    with refuses(ValueError, "outs[1]"):
        project_merge_list(w_old, w_new, masks, coefficients, [fused[:, 2:8], fused.view(5, 16)[:4, 9:15]])


def test_one_native_call_for_a_list(monkeypatch):
    """A launch on CUDA, a parallel region on the CPU: not one for each layer, which would give the same bits."""
    w_old, w_new = weight_pairs("cpu")
    masks = masks_of(w_old)
    calls = []
    for name in ("column_scores_list", "column_mask_list", "project_merge_list"):
        original = getattr(_C.cpu, name)

        def counted(items, name=name, original=original):
            calls.append((name, len(items)))
            return original(items)

        monkeypatch.setattr(_C.cpu, name, counted)
    scores = column_scores_list(w_old, w_new)[0]
    column_mask_list(scores, [1] * len(scores))
    project_merge_list(w_old, w_new, masks, torch.zeros(len(w_old)))
    count = len(w_old)
    assert calls == [("column_scores_list", count), ("column_mask_list", count), ("project_merge_list", count)]
