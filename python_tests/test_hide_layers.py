"""RoutedLinear: the base layer's output and the experts' branch, added as it is written."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DTYPES, assert_same_bits, normal

from hpa_ext.hide.layers import RoutedLinear
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.ops import routed_lora

TASKS, RANK, IN, OUT = 3, 2, 33, 20
SCALING = [2.0, 0.5, 1.0]


def layer_of(dtype, expert_dtype=None, gains=None):
    base = torch.nn.Linear(IN, OUT, dtype=dtype)
    a = normal(TASKS, RANK, IN, dtype=expert_dtype or dtype)
    b = normal(TASKS, OUT, RANK, dtype=expert_dtype or dtype)
    layer = RoutedLinear(base, a, b, SCALING, RoutingState(lambda prompt, images: None), gains)
    return layer, normal(2, 7, IN, dtype=dtype), torch.softmax(normal(2, TASKS), -1)


def separately(layer, x, weights):
    """The two parts computed one after the other, each rounded."""
    gains = layer._gain_changes
    base_input = x if gains is None else (x.float() * (1 + weights @ gains)[:, None, :]).to(x.dtype)
    output = layer.base(base_input)
    branch = routed_lora(x.to(layer.a.dtype), layer.a, layer.b, weights, torch.tensor(SCALING))
    return output + branch.to(output.dtype)


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("expert_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_two_steps(dtype, expert_dtype, gained):
    layer, x, weights = layer_of(dtype, expert_dtype, 0.1 * normal(TASKS, IN) if gained else None)
    seen = []
    layer.base.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad(), layer.state.fixed(weights):
        assert_same_bits(layer(x), separately(layer, x, weights))
    for output, then in seen:  # what a hook has been given stays as it is
        assert_same_bits(output, then)


@pytest.mark.parametrize("expert_dtype", [None, torch.float32])
def test_the_gradients_of_two_steps(expert_dtype):
    layer, x, weights = layer_of(torch.bfloat16, expert_dtype)
    layer.requires_grad_(True)
    x.requires_grad_()
    upstream = normal(2, 7, OUT, dtype=torch.bfloat16)
    leaves = [x, *layer.parameters()]
    with layer.state.fixed(weights):
        found = torch.autograd.grad(layer(x), leaves, upstream)
        expected = torch.autograd.grad(separately(layer, x, weights), leaves, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_a_copy_computes_the_same():
    layer, x, weights = layer_of(torch.bfloat16)
    other = copy.deepcopy(layer)
    with torch.no_grad(), layer.state.fixed(weights), other.state.fixed(weights):
        assert_same_bits(other(x), layer(x))
