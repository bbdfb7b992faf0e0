"""ops.routed_lora_list: several linears with one input, bit for bit what each alone gives."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers import DTYPES, GuardedAllocations, assert_same_bits, lay_out, normal, outside, refuses

from hpa_ext.ops import routed_lora, routed_lora_add_, routed_lora_list

# (out, rank) of each linear: q/k/v, gate/up, ragged, more than a launch of the CUDA kernels takes.
LINEARS = {
    "one": [(33, 5)],
    "q/k/v": [(48, 8), (16, 8), (16, 8)],
    "ragged": [(65, 3), (0, 4), (7, 17), (130, 1)],
    "ten": [(1 + 13 * number % 29, 1 + number % 4) for number in range(10)],
}


def arguments(linears, dtype, device, *, batch=2, tokens=7, in_features=33, tasks=3):
    of_weights = torch.float64 if dtype == torch.float64 else torch.float32
    draw = lambda *shape: normal(*shape, dtype=dtype, device=device)  # noqa: E731
    return (
        draw(batch, tokens, in_features),
        [draw(tasks, rank, in_features) for _, rank in linears],
        [draw(tasks, out, rank) for out, rank in linears],
        normal(batch, tasks, dtype=of_weights, device=device),
        [normal(tasks, dtype=of_weights, device=device) for _ in linears],
    )


def one_by_one(x, a, b, weights, scaling):
    return [routed_lora(x, *linear[:2], weights, linear[2]) for linear in zip(a, b, scaling, strict=True)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("linears", LINEARS)
def test_same_bits_as_each_alone(device, dtype, tokens, linears):
    tensors = arguments(LINEARS[linears], dtype, device, tokens=tokens)
    together = routed_lora_list(*tensors)
    assert isinstance(together, list)
    assert len(together) == len(LINEARS[linears])
    for ours, alone in zip(together, one_by_one(*tensors), strict=True):
        assert ours.is_contiguous()
        assert_same_bits(ours, alone)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("linears", LINEARS)
def test_onto_is_a_sum_of_rounded_values(device, dtype, linears):
    tensors = arguments(LINEARS[linears], dtype, device)
    branches = routed_lora_list(*tensors)
    onto = [normal(*branch.shape, dtype=dtype, device=device) for branch in branches]
    before = [t.clone() for t in onto]
    for ours, branch, to in zip(routed_lora_list(*tensors, onto=onto), branches, onto, strict=True):
        assert_same_bits(ours, to + branch)
        assert ours.data_ptr() != to.data_ptr() or ours.numel() == 0
    for now, then in zip(onto, before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("dtype", DTYPES)
def test_onto_without_tasks_or_features(device, dtype):
    for sizes in ({"tasks": 0}, {"in_features": 0}):
        x, a, b, weights, scaling = arguments([(5, 2)], dtype, device, **sizes)
        to = normal(2, 7, 5, dtype=dtype, device=device)
        assert torch.equal(routed_lora_list(x, a, b, weights, scaling, onto=[to])[0], to)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset", "padded_rows"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_added_in_place(device, dtype, layout):
    x, (a,), (b,), weights, (scaling,) = arguments([(33, 5)], dtype, device)
    before = normal(2, 7, 33, dtype=dtype, device=device)
    onto = lay_out(before, layout)
    others, version = outside(onto), onto._version
    assert routed_lora_add_(onto, x, a, b, weights, scaling) is onto
    assert_same_bits(onto, before + routed_lora(x, a, b, weights, scaling))
    assert_same_bits(outside(onto), others)
    assert onto._version > version


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shared", ["x itself", "rows of x", "b"])
def test_added_in_place_to_what_is_also_read(device, dtype, shared):
    x, (a,), (b,), weights, (scaling,) = arguments([(33, 5)], dtype, device)
    onto = x
    if shared == "rows of x":
        rows = normal(3 * 7, 33, dtype=dtype, device=device)
        x, onto = rows[:14].view(2, 7, 33), rows[5:19].view(2, 7, 33)
    elif shared == "b":
        memory = normal(4700, dtype=dtype, device=device)  # wide enough for several parts of B
        b, onto = memory[:4500].view(3, 300, 5), memory[100:4300].view(2, 7, 300)
    expected = onto + routed_lora(x, a, b, weights, scaling)
    assert_same_bits(routed_lora_add_(onto, x, a, b, weights, scaling), expected)


def test_added_in_place_refuses(device):
    x, (a,), (b,), weights, (scaling,) = arguments([(33, 5)], torch.float32, device)
    onto = torch.ones(2, 7, 33, device=device)
    with pytest.raises(RuntimeError, match=r"routed_lora_add_: expected no argument that requires grad"):
        routed_lora_add_(onto, x.requires_grad_(), a, b, weights, scaling)
    with torch.no_grad():
        with refuses(ValueError, "onto"):
            routed_lora_add_(onto[:, :6], x, a, b, weights, scaling)
        with refuses(TypeError, "onto"):
            routed_lora_add_(onto.half(), x, a, b, weights, scaling)
        assert bool((onto == 1).all())
        routed_lora_add_(onto, x, a, b, weights, scaling)


def test_empty_list(device):
    assert routed_lora_list(torch.ones(2, 7, 5, device=device), [], [], torch.ones(2, 3, device=device), []) == []
    assert routed_lora_list(torch.ones(2, 7, 5, device=device), [], [], torch.ones(2, 3), [], onto=[]) == []


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"in_features": 0}, {"tasks": 0}])
def test_empty_tensors(device, sizes):
    tensors = arguments(LINEARS["q/k/v"], torch.bfloat16, device, **sizes)
    results = routed_lora_list(*tensors)
    assert [tuple(y.shape) for y in results] == [(*tensors[0].shape[:2], out) for out, _ in LINEARS["q/k/v"]]
    assert not any(bool(y.any()) for y in results)


@pytest.mark.parametrize("layout", ["transposed", "every_other_column", "offset"])
def test_layouts(device, layout):
    x, a, b, weights, scaling = arguments(LINEARS["ragged"], torch.bfloat16, device)
    onto = [normal(2, 7, t.shape[1], dtype=torch.bfloat16, device=device) for t in b]
    expected = routed_lora_list(x, a, b, weights, scaling, onto=onto)
    lay = lambda tensors: [lay_out(t, layout) for t in tensors]  # noqa: E731
    found = routed_lora_list(*lay([x]), lay(a), lay(b), *lay([weights]), scaling, onto=lay(onto))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_an_allocation_is_written(device, dtype, monkeypatch):
    tensors = arguments(LINEARS["ragged"], dtype, device)
    expected = routed_lora_list(*tensors)
    guarded = GuardedAllocations(monkeypatch)
    for ours, theirs in zip(routed_lora_list(*tensors), expected, strict=True):
        assert_same_bits(ours, theirs)
    guarded.check()


def test_tuples_will_do(device):
    x, a, b, weights, scaling = arguments(LINEARS["q/k/v"], torch.float32, device)
    found = routed_lora_list(x, tuple(a), tuple(b), weights, tuple(scaling))
    for ours, theirs in zip(found, routed_lora_list(x, a, b, weights, scaling), strict=True):
        assert_same_bits(ours, theirs)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("with_onto", [False, True])
def test_compiled_with_gradients(device, with_onto):
    x, a, b, weights, scaling = arguments(LINEARS["q/k/v"], torch.float32, device)
    onto = [normal(2, 7, t.shape[1], device=device) for t in b] if with_onto else None
    leaves = [t.requires_grad_() for t in (x, weights, *a, *b, *scaling, *(onto or []))]

    def loss(x, a, b, weights, scaling, onto):
        return sum(y.square().sum() for y in routed_lora_list(x, a, b, weights, scaling, onto=onto))

    expected = torch.autograd.grad(loss(x, a, b, weights, scaling, onto), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, a, b, weights, scaling, onto), leaves), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


X, WEIGHTS = torch.ones(2, 7, 5), torch.ones(2, 3)
A, B, SCALING = [torch.ones(3, 4, 5)] * 2, [torch.ones(3, 6, 4)] * 2, [torch.ones(3)] * 2
ONTO = [torch.ones(2, 7, 6)] * 2
BAD = {
    "x is a list": ({"x": [[[1.0]]]}, TypeError, "x"),
    "x is a matrix": ({"x": X[0]}, ValueError, "x"),
    "a is a tensor": ({"a": torch.ones(2, 3, 4, 5)}, TypeError, "a"),
    "b is None": ({"b": None}, TypeError, "b"),
    "scaling is a tensor": ({"scaling": torch.ones(2, 3)}, TypeError, "scaling"),
    "onto is a tensor": ({"onto": torch.ones(2, 2, 7, 6)}, TypeError, "onto"),
    "b is short": ({"b": B[:1]}, ValueError, "b"),
    "scaling is long": ({"scaling": SCALING * 2}, ValueError, "scaling"),
    "onto is empty": ({"onto": []}, ValueError, "onto"),
    "a[1] is an array": ({"a": [A[0], numpy.ones((3, 4, 5), dtype="float32")]}, TypeError, "a[1]"),
    "a[1] has other tasks": ({"a": [A[0], torch.ones(2, 4, 5)]}, ValueError, "a[1]"),
    "a[1] has rank 0": ({"a": [A[0], torch.ones(3, 0, 5)]}, ValueError, "a[1]"),
    "a[1] is narrow": ({"a": [A[0], torch.ones(3, 4, 4)]}, ValueError, "a[1]"),
    "a[0] is half": ({"a": [A[0].half(), A[1]]}, TypeError, "a[0]"),
    "b[1] has another rank": ({"b": [B[0], torch.ones(3, 6, 3)]}, ValueError, "b[1]"),
    "b[1] is double": ({"b": [B[0], B[1].double()]}, TypeError, "b[1]"),
    "b[0] is elsewhere": ({"b": [B[0].to("meta"), B[1]]}, ValueError, "b[0]"),
    "weights is of another batch": ({"weights": WEIGHTS[:1]}, ValueError, "weights"),
    "scaling[1] is long": ({"scaling": [SCALING[0], torch.ones(4)]}, ValueError, "scaling[1]"),
    "scaling[1] is half": ({"scaling": [SCALING[0], SCALING[1].half()]}, TypeError, "scaling[1]"),
    "onto[1] is wide": ({"onto": [ONTO[0], torch.ones(2, 7, 7)]}, ValueError, "onto[1]"),
    "onto[1] is half": ({"onto": [ONTO[0], ONTO[1].half()]}, TypeError, "onto[1]"),
    "onto[0] is None": ({"onto": [None, ONTO[1]]}, TypeError, "onto[0]"),
}


@pytest.mark.parametrize("graph", [False, True], ids=["direct", "differentiable"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad, graph):
    changed, exception, name = BAD[bad]
    weights = WEIGHTS.clone().requires_grad_(graph)
    with refuses(exception, name):
        routed_lora_list(**{"x": X, "a": A, "b": B, "weights": weights, "scaling": SCALING, "onto": ONTO, **changed})
