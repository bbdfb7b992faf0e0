"""ops.routed_lora: several LoRA experts on one input, weighted for each sample."""

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
    integers,
    lay_out,
    normal,
    refuses,
)

from hpa_ext.ops import routed_lora

# batch, tokens, in, out, tasks, rank
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 7, 17, 65, 3, 2),
    (2, 17, 65, 130, 4, 8),
    (3, 5, 257, 130, 6, 8),
    (1, 130, 130, 257, 2, 16),
    (2, 1, 7, 17, 1, 1),
    (5, 3, 48, 96, 2, 5),
    (1, 1, 257, 1, 7, 33),
]


def arguments(size, dtype, device, draw=normal):
    batch, tokens, in_features, out_features, tasks, rank = size
    of_weights = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(batch, tokens, in_features, dtype=dtype, device=device)
    a = draw(tasks, rank, in_features, dtype=dtype, device=device)
    b = draw(tasks, out_features, rank, dtype=dtype, device=device)
    weights = draw(batch, tasks, dtype=of_weights, device=device)
    return x, a, b, weights, draw(tasks, dtype=of_weights, device=device)


def loop(x, a, b, weights, scaling, dtype):
    """Sample by sample and expert by expert, everything in `dtype`."""
    x, a, b, weights, scaling = (t.to(dtype) for t in (x, a, b, weights, scaling))
    y = torch.zeros(*x.shape[:2], b.shape[1], dtype=dtype, device=x.device)
    for s in range(x.shape[0]):
        for c in range(a.shape[0]):
            y[s] += weights[s, c] * scaling[c] * (x[s] @ a[c].mT @ b[c].mT)
    return y


def small_integers(*shape, dtype, device):
    """From -2 to 2, so that the results stay exact in float32."""
    return torch.randint(-2, 3, shape).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_accuracy(device, dtype, size):
    tensors = arguments(size, dtype, device)
    exact = loop(*tensors, torch.float64)
    y = routed_lora(*tensors)
    assert y.dtype == dtype
    assert y.is_contiguous()
    # What the magnitudes add up to is what rounding is relative to.
    scale = loop(*(t.abs() for t in tensors), torch.float64)
    of_torch = loop(*tensors, torch.float32).to(dtype)
    assert_accurate(y, exact, of_torch, scale=scale, roundings=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_better_than_torch_in_the_same_dtype(device, dtype):
    tensors = arguments((2, 17, 65, 130, 4, 8), dtype, device)
    exact = loop(*tensors, torch.float64)
    error = (routed_lora(*tensors).double() - exact).abs().max()
    assert float(error) < float((loop(*tensors, dtype).double() - exact).abs().max())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_integers_are_summed_exactly(device, dtype, size):
    tensors = arguments(size, dtype, device, small_integers)
    exact = loop(*tensors, torch.float64)
    assert float(exact.abs().max()) < 2**24
    assert torch.equal(routed_lora(*tensors), exact.to(dtype))


def test_a_small_example():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    a = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # the first expert reads x_0, the second x_1
    b = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])  # and each writes to its own output
    weights = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    y = routed_lora(x, a, b, weights, torch.tensor([10.0, 100.0]))
    assert y.tolist() == [[[10.0, 100.0]], [[0.0, 400.0]]]


def test_float64(device):
    tensors = arguments((2, 7, 17, 33, 3, 4), torch.float64, device)
    y = routed_lora(*tensors)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, loop(*tensors, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [(0, 7, 17, 5, 2, 3), (2, 0, 17, 5, 2, 3), (2, 7, 0, 5, 2, 3), (2, 7, 17, 0, 2, 3), (2, 7, 17, 5, 0, 3)],
)
def test_empty(device, dtype, size):
    y = routed_lora(*arguments(size, dtype, device))
    assert y.shape == (size[0], size[1], size[3])
    assert y.dtype == dtype
    assert not bool(y.any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layout(device, dtype, layout):
    x, a, b, weights, scaling = arguments((2, 7, 33, 17, 3, 5), dtype, device, small_integers)
    exact = loop(x, a, b, weights, scaling, torch.float64).to(dtype)
    strided_scaling = torch.full((6,), torch.nan, device=device)[::2].copy_(scaling)
    views = [lay_out(t, layout) for t in (x, a, b, weights)]
    assert torch.equal(routed_lora(*views, strided_scaling), exact)
    permuted = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(routed_lora(permuted, a, b, weights, scaling), exact)


def test_expanded_arguments(device):
    x, a, b, weights, scaling = arguments((1, 7, 33, 17, 1, 5), torch.float32, device, small_integers)
    y = routed_lora(x.expand(3, 7, 33), a.expand(4, 5, 33), b.expand(4, 17, 5), weights.expand(3, 4), scaling.expand(4))
    assert torch.equal(y, 4 * routed_lora(x, a, b, weights, scaling).expand(3, 7, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_nothing_outside_an_allocation_is_written(device, dtype, size, monkeypatch):
    tensors = arguments(size, dtype, device, small_integers)
    exact = loop(*tensors, torch.float64).to(dtype)
    guarded = GuardedAllocations(monkeypatch)
    assert torch.equal(routed_lora(*tensors), exact)
    guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 9))
def test_offset_views(device, dtype, offset):
    tensors = arguments((2, 7, 33, 17, 3, 5), dtype, device, small_integers)
    exact = loop(*tensors, torch.float64).to(dtype)
    shifted = []
    for tensor in tensors:
        buffer = torch.full((tensor.numel() + offset + 1,), torch.nan, dtype=tensor.dtype, device=device)
        shifted.append(buffer[offset:-1].view(tensor.shape).copy_(tensor))
    assert torch.equal(routed_lora(*shifted), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_do_not_mix(device, dtype):
    x, a, b, weights, scaling = arguments((3, 7, 33, 17, 3, 5), dtype, device, small_integers)
    y = routed_lora(x, a, b, weights, scaling)
    for s in range(3):
        assert torch.equal(y[s : s + 1], routed_lora(x[s : s + 1], a, b, weights[s : s + 1], scaling))
    x[1] = torch.nan
    spoilt = routed_lora(x, a, b, weights, scaling)
    assert torch.equal(spoilt[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_is_a_lora(device, dtype):
    x, a, b, _, _ = arguments((2, 7, 33, 17, 1, 5), dtype, device, small_integers)
    y = routed_lora(x, a, b, torch.ones(2, 1, device=device), torch.full((1,), 0.5, device=device))
    assert torch.equal(y.double(), 0.5 * (x.double() @ a[0].double().mT @ b[0].double().mT))


def test_weights_and_scaling_act_alike(device):
    x, a, b, weights, scaling = arguments((2, 7, 33, 17, 3, 5), torch.float32, device, small_integers)
    once = routed_lora(x, a, b, weights * scaling, torch.ones_like(scaling))
    assert torch.equal(once, routed_lora(x, a, b, weights, scaling))
    assert not bool(routed_lora(x, a, b, torch.zeros_like(weights), scaling).any())
    assert not bool(routed_lora(x, a, b, weights, torch.zeros_like(scaling)).any())


def test_half_precision_between_the_products(device):
    """The intermediate exceeds float16, the result does not."""
    x = torch.full((1, 2, 64), 100.0, dtype=torch.float16, device=device)
    a = torch.full((1, 1, 64), 100.0, dtype=torch.float16, device=device)
    b = torch.ones(1, 3, 1, dtype=torch.float16, device=device)
    y = routed_lora(x, a, b, torch.ones(1, 1, device=device), torch.full((1,), 2.0**-10, device=device))
    assert torch.equal(y, torch.full((1, 2, 3), 625.0, dtype=torch.float16, device=device))


def test_arguments_are_not_changed(device):
    tensors = arguments((2, 7, 33, 17, 3, 5), torch.bfloat16, device)
    before = [tensor.clone() for tensor in tensors]
    routed_lora(*tensors)
    for now, then in zip(tensors, before, strict=True):
        assert_same_bits(now, then)


def test_gradcheck(device):
    tensors = arguments((2, 3, 5, 4, 3, 2), torch.float64, device)
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(routed_lora, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(device, dtype):
    tensors = [tensor.requires_grad_() for tensor in arguments((2, 17, 65, 33, 3, 8), dtype, device)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream = normal(2, 17, 33, device=device)
    routed_lora(*tensors).backward(upstream.to(dtype))
    loop(*exact, torch.float64).backward(upstream.to(dtype).double())
    for ours, expected in zip(tensors, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert ours.grad.shape == ours.shape
        error = (ours.grad.double() - expected.grad).abs().max() / expected.grad.abs().max()
        assert float(error) <= max(1e-6, torch.finfo(ours.dtype).eps)


@pytest.mark.parametrize("wanted", range(5))
def test_gradient_of_one_argument_alone(device, wanted):
    tensors = list(arguments((2, 3, 5, 4, 3, 2), torch.float32, device))
    tensors[wanted].requires_grad_()
    routed_lora(*tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [index == wanted for index in range(5)]


def test_no_graph_without_gradients(device):
    tensors = arguments((2, 3, 5, 4, 3, 2), torch.float32, device)
    with torch.no_grad():
        assert not routed_lora(tensors[0].requires_grad_(), *tensors[1:]).requires_grad


X, A, B = torch.ones(2, 7, 5), torch.ones(3, 4, 5), torch.ones(3, 6, 4)
WEIGHTS, SCALING = torch.ones(2, 3), torch.ones(3)
BAD = {
    "x is a list": ({"x": [[[1.0]]]}, TypeError, "x"),
    "x is None": ({"x": None}, TypeError, "x"),
    "x is an array": ({"x": numpy.ones((2, 7, 5), dtype="float32")}, TypeError, "x"),
    "x is of integers": ({"x": X.long()}, TypeError, "x"),
    "x is a matrix": ({"x": X[0]}, ValueError, "x"),
    "x is sparse": ({"x": X.to_sparse()}, TypeError, "x"),
    "x is of another dtype": ({"x": X.bfloat16()}, TypeError, "a"),
    "x is elsewhere": ({"x": X.to("meta")}, ValueError, "weights"),
    "x is too narrow": ({"x": X[..., :4]}, ValueError, "a"),
    "a is a list": ({"a": [[[1.0]]]}, TypeError, "a"),
    "a is None": ({"a": None}, TypeError, "a"),
    "a is a matrix": ({"a": A[0]}, ValueError, "a"),
    "a is of integers": ({"a": A.long()}, TypeError, "a"),
    "a is of another dtype": ({"a": A.half()}, TypeError, "a"),
    "a is transposed": ({"a": A.mT}, ValueError, "a"),
    "a has rank 0": ({"a": A[:, :0]}, ValueError, "a"),
    "a is of another rank": ({"a": A[:, :3]}, ValueError, "b"),
    "a is of fewer tasks": ({"a": A[:2]}, ValueError, "b"),
    "a is sparse": ({"a": A.to_sparse()}, TypeError, "a"),
    "a is elsewhere": ({"a": A.to("meta")}, ValueError, "a"),
    "b is a list": ({"b": [[[1.0]]]}, TypeError, "b"),
    "b is an array": ({"b": numpy.ones((3, 6, 4), dtype="float32")}, TypeError, "b"),
    "b is a matrix": ({"b": B[0]}, ValueError, "b"),
    "b is of another dtype": ({"b": B.double()}, TypeError, "b"),
    "b is transposed": ({"b": B.mT}, ValueError, "b"),
    "b is sparse": ({"b": B.to_sparse()}, TypeError, "b"),
    "b is elsewhere": ({"b": B.to("meta")}, ValueError, "b"),
    "weights is a list": ({"weights": [[1.0] * 3] * 2}, TypeError, "weights"),
    "weights is None": ({"weights": None}, TypeError, "weights"),
    "weights is bfloat16": ({"weights": WEIGHTS.bfloat16()}, TypeError, "weights"),
    "weights is float64": ({"weights": WEIGHTS.double()}, TypeError, "weights"),
    "weights is a vector": ({"weights": WEIGHTS[0]}, ValueError, "weights"),
    "weights is of another batch": ({"weights": WEIGHTS[:1]}, ValueError, "weights"),
    "weights is transposed": ({"weights": WEIGHTS.mT}, ValueError, "weights"),
    "weights is sparse": ({"weights": WEIGHTS.to_sparse()}, TypeError, "weights"),
    "weights is elsewhere": ({"weights": WEIGHTS.to("meta")}, ValueError, "weights"),
    "scaling is a number": ({"scaling": 2.0}, TypeError, "scaling"),
    "scaling is a list": ({"scaling": [1.0] * 3}, TypeError, "scaling"),
    "scaling is of integers": ({"scaling": SCALING.long()}, TypeError, "scaling"),
    "scaling is a matrix": ({"scaling": SCALING[None]}, ValueError, "scaling"),
    "scaling is too long": ({"scaling": torch.ones(4)}, ValueError, "scaling"),
    "scaling is sparse": ({"scaling": SCALING.to_sparse()}, TypeError, "scaling"),
    "scaling is elsewhere": ({"scaling": SCALING.to("meta")}, ValueError, "scaling"),
}


@pytest.mark.parametrize("graph", [False, True], ids=["direct", "differentiable"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad, graph):
    changed, exception, name = BAD[bad]
    scaling = SCALING.clone().requires_grad_(graph)
    with refuses(exception, name):
        routed_lora(**{"x": X, "a": A, "b": B, "weights": WEIGHTS, "scaling": scaling, **changed})


def test_integers_helper_is_symmetric():
    """The data of the exact tests has both signs, so that errors of sign cannot cancel."""
    values = integers(1000)
    assert values.min() == -4
    assert values.max() == 4
