"""ops.column_scores_list: each layer as alone, whatever the list."""

from __future__ import annotations

import pytest
import torch
from helpers import GuardedAllocations, assert_same_bits, is_native, normal, refuses
from layer_lists import laid_out, weight_pairs

from hpa_ext.ops import column_scores, column_scores_list


def assert_as_alone(w_old, w_new):
    squares, inner, norm = column_scores_list(w_old, w_new)
    assert len(squares) == len(inner) == len(norm) == len(w_old)
    for i, (old, new) in enumerate(zip(w_old, w_new, strict=True)):
        for ours, alone in zip((squares[i], inner[i], norm[i]), column_scores(old, new), strict=True):
            assert_same_bits(ours, alone)


def test_each_layer_is_as_alone(device):
    assert_as_alone(*weight_pairs(device))


def test_any_order_and_any_layout(device):
    w_old, w_new = weight_pairs(device)
    assert_as_alone(laid_out(w_old)[::-1], laid_out(w_new)[::-1])


def test_float64_through_torch(device):
    assert_as_alone(*weight_pairs(device, dtypes=[torch.float64]))


def test_three_hundred_layers(device):
    """More than one table of the CUDA kernel holds; each layer differs from its neighbours."""
    w_old, w_new = weight_pairs(device, shapes=[(1 + i % 3, 1 + i % 5) for i in range(300)])
    assert_as_alone(w_old, w_new)


def test_more_partial_sums_than_the_scratch_memory_takes():
    """Six layers of 8 MiB of partial sums each; the CPU's scratch memory holds four of them."""
    w_old, w_new = weight_pairs(torch.device("cpu"), shapes=[(2, 1 << 21)] * 6, dtypes=[torch.bfloat16])
    assert_as_alone(w_old, w_new)


def test_one_layer_many_times(device):
    (old,), (new,) = weight_pairs(device, shapes=[(33, 264)])
    assert_as_alone([old] * 5, [new] * 5)


def test_empty_list():
    squares, inner, norm = column_scores_list([], [])
    assert squares == [] and inner.shape == norm.shape == (0,) and inner.dtype == torch.float32


def test_nothing_outside_an_allocation_is_written(device, monkeypatch):
    w_old, w_new = weight_pairs(device)
    guarded = GuardedAllocations(monkeypatch)
    assert_as_alone(w_old, w_new)
    guarded.check()


def test_tuples_and_parameters(device):
    w_old, w_new = weight_pairs(device, dtypes=[torch.float32])
    parameters = tuple(torch.nn.Parameter(w) for w in w_old), tuple(torch.nn.Parameter(w) for w in w_new)
    squares, inner, norm = column_scores_list(*parameters)
    assert not any(t.requires_grad for t in (*squares, inner, norm))
    assert_same_bits(inner, column_scores_list(w_old, w_new)[1])


GOOD = [torch.ones(3, 5), torch.ones(2, 4).bfloat16()]
BAD = {
    "a tensor": ({"w_old": torch.ones(2, 3, 5)}, TypeError, "w_old"),
    "None": ({"w_new": None}, TypeError, "w_new"),
    "a string": ({"w_new": "ab"}, TypeError, "w_new"),
    "a generator": ({"w_old": (w for w in GOOD)}, TypeError, "w_old"),
    "one too few": ({"w_new": GOOD[:1]}, ValueError, "w_new"),
    "one too many": ({"w_new": [*GOOD, GOOD[0]]}, ValueError, "w_new"),
    "an entry is None": ({"w_new": [GOOD[0], None]}, TypeError, "w_new[1]"),
    "a vector": ({"w_old": [GOOD[0][0], GOOD[1]]}, ValueError, "w_old[0]"),
    "integers": ({"w_old": [GOOD[0], GOOD[1].int()]}, TypeError, "w_old[1]"),
    "another shape": ({"w_new": [GOOD[0], GOOD[1].mT]}, ValueError, "w_new[1]"),
    "another dtype": ({"w_new": [GOOD[0], GOOD[1].half()]}, TypeError, "w_new[1]"),
    "another device": ({"w_new": [GOOD[0], GOOD[1].to("meta")]}, ValueError, "w_new[1]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changed, exception, name = BAD[bad]
    with refuses(exception, name):
        column_scores_list(**{"w_old": GOOD, "w_new": GOOD, **changed})


def test_layers_on_two_devices():
    weights = [GOOD[0], GOOD[1].to("meta")]
    with refuses(ValueError, "w_old[1]"):
        column_scores_list(weights, weights)


@pytest.mark.parametrize("place", [0, 1])
def test_float64_for_some_layers_only(place):
    weights = list(GOOD)
    weights[place] = weights[place].double()
    with refuses(TypeError, "w_old[1]"):
        column_scores_list(weights, weights)


def test_the_thread_count_changes_nothing():
    if not is_native("column_scores"):
        pytest.skip("torch's own sums may depend on the number of threads")
    w_old, w_new = weight_pairs(torch.device("cpu"), shapes=[(700, 300), (300, 5000), (129, 65)])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        squares, inner, norm = column_scores_list(w_old, w_new)
        results.append(torch.cat([*squares, inner, norm]))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    """The table of layers is part of the launch, so a replay needs nothing of the host."""
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    w_old, w_new = weight_pairs(device)
    column_scores_list(w_old, w_new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = column_scores_list(w_old, w_new)
    for w in w_new:
        w.copy_(normal(*w.shape, dtype=w.dtype, device=device))
    graph.replay()
    for ours, expected in zip(captured[0], column_scores_list(w_old, w_new)[0], strict=True):
        assert_same_bits(ours, expected)
