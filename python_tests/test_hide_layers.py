"""RoutedLinear: the base layer's output and the experts' branch, added as it is written."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import DTYPES, assert_same_bits, normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hpa_ext.hide import layers
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


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("expert_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_two_steps(dtype, expert_dtype, gained, hooked):
    layer, x, weights = layer_of(dtype, expert_dtype, 0.1 * normal(TASKS, IN) if gained else None)
    seen = []
    if hooked:
        layer.base.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad(), layer.state.fixed(weights):
        assert_same_bits(layer(x), separately(layer, x, weights))
    assert len(seen) == 2 * hooked
    for output, then in seen:  # what a hook has been given stays as it is
        assert_same_bits(output, then)


class Remembering(torch.nn.Linear):
    """Gives the same tensor to every caller."""

    def forward(self, x):
        self.output = super().forward(x)
        return self.output


def keep_globally(keep):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: keep(output))


@pytest.mark.parametrize("who", ["a subclass", "a global hook", "a patched forward"])
def test_an_output_that_others_hold_is_not_written(who):
    layer, x, weights = layer_of(torch.bfloat16)
    kept = []
    handle = None
    if who == "a subclass":
        layer.base.__class__ = Remembering
    elif who == "a global hook":
        handle = keep_globally(lambda output: kept.append((output, output.clone())))
    else:
        own = layer.base.forward
        layer.base.forward = lambda x: kept.append(own(x)) or kept[-1]
    try:
        with torch.no_grad(), layer.state.fixed(weights):
            layer(x)
    finally:
        if handle is not None:
            handle.remove()
    of_base = {"a subclass": lambda: layer.base.output, "a global hook": lambda: kept[0][0]}
    held = of_base.get(who, lambda: kept[0])()
    assert_same_bits(held, torch.nn.functional.linear(x, layer.base.weight, layer.base.bias))


class Keeping(TorchDispatchMode):
    """Keeps what operations give, as selective checkpointing does."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.kept.append((output, output.clone()))
        return output


def test_an_output_that_a_mode_keeps_is_not_written():
    layer, x, weights = layer_of(torch.float32)
    with torch.no_grad(), layer.state.fixed(weights), Keeping() as mode:
        output = layer(x)
    assert mode.kept
    for kept, then in mode.kept:
        assert_same_bits(kept, then)
    with torch.no_grad():
        assert_same_bits(output, separately(layer, x, weights))


def test_a_frozen_layer_under_selective_checkpointing():
    layer, x, weights = layer_of(torch.float32)
    layer.requires_grad_(False)
    tail = torch.nn.Linear(OUT, 3)

    def policy(context, operation, *args, **kwargs):
        products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    def loss(x):
        return tail(layer(x)).square().sum()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with layer.state.fixed(weights):
        found = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False, context_fn=contexts), tail.weight)
        expected = torch.autograd.grad(loss(x), tail.weight)
    assert_same_bits(found[0], expected[0])


def test_an_output_of_a_class_that_was_patched_is_not_written(monkeypatch):
    layer, x, weights = layer_of(torch.float32)
    kept, own = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: kept.append(own(self, x)) or kept[-1])
    with torch.no_grad(), layer.state.fixed(weights):
        layer(x)
    assert_same_bits(kept[0], torch.nn.functional.linear(x, layer.base.weight, layer.base.bias))


def test_inference_writes_in_place_and_training_does_not(monkeypatch):
    layer, x, weights = layer_of(torch.bfloat16)
    calls = []
    true = layers.routed_lora_add_
    monkeypatch.setattr(layers, "routed_lora_add_", lambda *args: calls.append(1) or true(*args))
    with layer.state.fixed(weights):
        with torch.inference_mode():
            layer(x)
        assert len(calls) == 1
        layer(x)  # the base's weight requires grad
        layer.base.requires_grad_(False)
        layer.a.requires_grad_()
        layer(x)
        assert len(calls) == 1


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
