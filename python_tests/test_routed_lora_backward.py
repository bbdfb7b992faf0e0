"""The gradients of routed_lora and routed_lora_list."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, assert_same_bits, normal
from test_routed_lora_list import LINEARS, arguments

from hpa_ext import _C
from hpa_ext.ops import routed_lora, routed_lora_backward, routed_lora_list


def leaves_of(x, a, b, weights, scaling):
    return [x, weights, *a, *b, *scaling]


def exact_gradients(tensors, upstream):
    """Through a loop over linears, experts and samples in float64."""
    x, a, b, weights, scaling = (
        [t.detach().double() for t in value] if isinstance(value, list) else value.detach().double()
        for value in tensors
    )
    leaves = [t.requires_grad_() for t in leaves_of(x, a, b, weights, scaling)]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a_, b_, scaling_, grad in zip(a, b, scaling, upstream, strict=True):
        for s, c in itertools.product(range(x.shape[0]), range(a_.shape[0])):
            branch = weights[s, c] * scaling_[c] * (x[s] @ a_[c].mT @ b_[c].mT)
            total = total + (branch * grad[s].double()).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("linears", LINEARS)
def test_against_float64(device, dtype, tokens, linears):
    tensors = arguments(LINEARS[linears], dtype, device, tokens=tokens)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    outputs = routed_lora_list(*tensors)
    upstream = [normal(*y.shape, dtype=dtype, device=device) for y in outputs]
    found = torch.autograd.grad(outputs, leaves, upstream)
    for ours, exact, leaf in zip(found, exact_gradients(tensors, upstream), leaves, strict=True):
        assert ours.dtype == leaf.dtype
        assert ours.shape == leaf.shape
        if exact.numel() and float(exact.abs().max()) > 0:
            error = float((ours.double() - exact).abs().max() / exact.abs().max())
            assert error <= max(2e-6, torch.finfo(ours.dtype).eps / 2), (error, leaf.shape)
        else:
            assert not bool(ours.any())


@pytest.mark.parametrize("wanted", range(5))
def test_only_what_needs_one_is_computed(device, wanted, monkeypatch):
    tensors = arguments(LINEARS["q/k/v"], torch.bfloat16, device)
    every = [t.detach().clone().requires_grad_() for t in leaves_of(*tensors)]
    x, weights, *rest = every
    all_of = x, rest[:3], rest[3:6], weights, rest[6:]
    upstream = [normal(2, 7, out, dtype=torch.bfloat16, device=device) for out, _ in LINEARS["q/k/v"]]
    expected = dict(enumerate(torch.autograd.grad(routed_lora_list(*all_of), every, upstream)))
    chosen = {0: [0], 1: [1], 2: [3], 3: [7], 4: [8]}[wanted]  # x, weights, one a, one b, one scaling
    asked = [t.detach().clone().requires_grad_(number in chosen) for number, t in enumerate(every)]
    x, weights, *rest = asked
    seen = []
    native = _C.cpu.routed_lora_backward
    if x.device.type == "cpu":
        monkeypatch.setattr(_C.cpu, "routed_lora_backward", lambda *args: (seen.append(args), native(*args)))
    outputs = routed_lora_list(x, rest[:3], rest[3:6], weights, rest[6:])
    found = torch.autograd.grad(outputs, [asked[number] for number in chosen], upstream)
    for ours, number in zip(found, chosen, strict=True):
        assert_same_bits(ours, expected[number])
    if seen:
        (call,) = seen
        to_a, to_b, to_gate = zip(*(linear[6:] for linear in call[-1]), strict=True)
        assert bool(call[2]) == (wanted == 0)
        assert [bool(t) for t in to_a] == [wanted == 2 and number == 1 for number in range(3)]
        assert [bool(t) for t in to_b] == [wanted == 3 and number == 2 for number in range(3)]
        assert [bool(t) for t in to_gate] == [wanted == 1 or (wanted == 4 and number == 0) for number in range(3)]


def test_an_output_that_is_not_used_costs_nothing(device, monkeypatch):
    tensors = arguments(LINEARS["q/k/v"], torch.float32, device)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    outputs = routed_lora_list(*tensors)
    upstream = normal(*outputs[1].shape, device=device)
    found = torch.autograd.grad(outputs[1], leaves, upstream, allow_unused=True)
    x, a, b, weights, scaling = tensors
    alone = [x, weights, a[1], b[1], scaling[1]]
    expected = torch.autograd.grad(routed_lora(x, a[1], b[1], weights, scaling[1]), alone, upstream)
    for number, theirs in zip((0, 1, 3, 6, 9), expected, strict=True):
        assert_same_bits(found[number], theirs)
    assert [t is None for t in found] == [number not in (0, 1, 3, 6, 9) for number in range(11)]


def test_the_sum_over_linears_is_rounded_once(device):
    """1 + 2^-8 in bfloat16 is 1, 1 + 2 * 2^-8 is not: lost if the sum were rounded after each linear."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    x = one.clone().requires_grad_()
    parts = [1.0, 2.0**-8, 2.0**-8]
    outputs = routed_lora_list(
        x,
        [one] * 3,
        [one * part for part in parts],
        torch.ones(1, 1, device=device),
        [torch.ones(1, device=device)] * 3,
    )
    torch.autograd.backward(outputs, [one] * 3)
    expected = torch.tensor(sum(parts), dtype=torch.float32).bfloat16()
    assert float(x.grad) == float(expected) != 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_intermediate_is_not_rounded(device, dtype):
    """What lies between the products leaves the range of float16 or the digits of bfloat16, the gradients do not."""
    large = torch.full((1, 4, 64), 257.0 if dtype == torch.bfloat16 else 100.0, device=device).to(dtype)
    b = torch.full((1, 64, 1), 100.0, device=device).to(dtype)
    x, a = large.clone().requires_grad_(), torch.ones(1, 1, 64, dtype=dtype, device=device)
    weights, scaling = torch.ones(1, 1, device=device), torch.full((1,), 2.0**-12, device=device)
    routed_lora(x, a, b, weights, scaling).backward(large)
    expected = (large[0, 0].double() @ b[0].double() * 2.0**-12).to(dtype)
    assert torch.equal(x.grad, expected.expand_as(x))


def test_gradient_of_onto_is_that_of_the_output(device):
    tensors = arguments(LINEARS["q/k/v"], torch.bfloat16, device)
    onto = [normal(2, 7, out, dtype=torch.bfloat16, device=device).requires_grad_() for out, _ in LINEARS["q/k/v"]]
    outputs = routed_lora_list(*tensors, onto=onto)
    upstream = [normal(*y.shape, dtype=torch.bfloat16, device=device) for y in outputs]
    for ours, theirs in zip(torch.autograd.grad(outputs, onto, upstream), upstream, strict=True):
        assert_same_bits(ours, theirs)


def flat_call(count):
    def call(x, weights, *rest):
        a, b, scaling, onto = (list(rest[part * count : (part + 1) * count]) for part in range(4))
        return tuple(routed_lora_list(x, a, b, weights, scaling, onto=onto))

    return call


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(device, check):
    """Twice differentiable: where a graph of the gradients is asked for, they are made of torch's operations."""
    tensors = arguments([(4, 2), (3, 1)], torch.float64, device, tokens=3, in_features=5)
    leaves = leaves_of(*tensors) + [normal(2, 3, out, dtype=torch.float64, device=device) for out in (4, 3)]
    assert check(flat_call(2), [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_of_the_gradients_changes_them_little(device, dtype):
    tensors = arguments(LINEARS["q/k/v"], dtype, device)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    upstream = [normal(2, 7, out, dtype=dtype, device=device) for out, _ in LINEARS["q/k/v"]]
    plain = torch.autograd.grad(routed_lora_list(*tensors), leaves, upstream)
    graphed = torch.autograd.grad(routed_lora_list(*tensors), leaves, upstream, create_graph=True)
    for ours, theirs in zip(plain, graphed, strict=True):
        assert not ours.requires_grad
        assert theirs.requires_grad
        torch.testing.assert_close(ours, theirs.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("served_by", ["native", "torch"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_does_not_lower_the_precision(device, monkeypatch, create_graph, served_by):
    if served_by == "torch":
        monkeypatch.setattr(routed_lora_backward, "backend_of", lambda *_: "torch")
    tensors = arguments(LINEARS["q/k/v"], torch.float32, device)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    upstream = [normal(2, 7, out, device=device) for out, _ in LINEARS["q/k/v"]]
    expected = torch.autograd.grad(routed_lora_list(*tensors), leaves, upstream)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        found = torch.autograd.grad(routed_lora_list(*tensors), leaves, upstream, create_graph=create_graph)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_thread_count_changes_nothing(dtype):
    tensors = arguments(LINEARS["ragged"], dtype, "cpu", tokens=300, in_features=130)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    upstream = [normal(2, 300, out, dtype=dtype) for out, _ in LINEARS["ragged"]]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(routed_lora_list(*tensors), leaves, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert_same_bits(ours, theirs)


def test_strided_gradients_and_arguments(device):
    x, a, b, weights, scaling = arguments([(6, 4)], torch.float32, device)
    upstream = normal(2, 6, 7, device=device).mT
    leaves = [x.mT.contiguous().mT.requires_grad_(), b[0].mT.contiguous().mT.requires_grad_()]
    found = torch.autograd.grad(routed_lora(leaves[0], a[0], leaves[1], weights, scaling[0]), leaves, upstream)
    plain = [x.clone().requires_grad_(), b[0].clone().requires_grad_()]
    expected = torch.autograd.grad(
        routed_lora(plain[0], a[0], plain[1], weights, scaling[0]), plain, upstream.contiguous()
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours.contiguous(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"in_features": 0}, {"tasks": 0}])
def test_empty(device, sizes, dtype):
    tensors = arguments(LINEARS["q/k/v"], dtype, device, **sizes)
    leaves = [t.requires_grad_() for t in leaves_of(*tensors)]
    outputs = routed_lora_list(*tensors)
    for grad, leaf in zip(torch.autograd.grad(outputs, leaves, outputs), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not bool(grad.any())
