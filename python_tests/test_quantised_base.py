"""The gain must act on the base layer's input alone, whatever a quantised base layer does with it."""

from __future__ import annotations

import adapter_models
import pytest
import tiny_models
import torch
from adapter_steps import first_batch, harmonized
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from hpa_ext.adapters import load_adapter, merge_adapter
from hpa_ext.adapters.gain import attach_gain
from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.models.skeleton import skeleton


class Int8Linear(nn.Linear):
    """A linear whose weight is int8 with a scale for each row, dequantised in the forward pass."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)
        self.inputs = []

    def dequantised(self):
        return self.weight * self.scale

    def forward(self, x):
        self.inputs.append(x.detach())
        return nn.functional.linear(x, self.dequantised(), self.bias)


class OwnLoraLayer(nn.Module, LoraLayer):
    """A LoRA layer of its own around a quantised base, as PEFT has for each kind of quantisation; merges by itself."""

    def __init__(self, base):
        super().__init__()
        LoraLayer.__init__(self, base)
        self.add("default", 2, 3.0)

    def add(self, name, rank, scaling):
        self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B[name] = nn.Linear(rank, self.out_features, bias=False)
        self.scaling[name] = scaling
        self._active_adapter = list(self.lora_A)

    def merge(self, safe_merge=False, adapter_names=None):
        self.merged_adapters.append("default")

    def unmerge(self):
        self.merged_adapters.clear()

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    directory = tmp_path_factory.mktemp("step")
    base = adapter_models.save(tiny_models.llava(), directory / "base")
    options = {"target_modules": adapter_models.LANGUAGE}
    tuned = adapter_models.adapter(adapter_models.load(base), directory / "tuned", **options)
    return base, harmonized(tuned, skeleton(base), directory / "step", 5)


def quantised(base):
    model = adapter_models.load(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "language_model" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model


def test_loaded_onto_a_quantised_base(step):
    base, path = step
    model = load_adapter(quantised(base), path)
    source = LoraAdapter(path, skeleton(base))
    calls = {}
    for name in source.updates:
        layer = model.get_base_model().get_submodule(name)
        assert isinstance(layer.get_base_layer(), Int8Linear)
        layer.register_forward_hook(lambda module, inputs, output, name=name: calls.update({name: (inputs[0], output)}))
    tiny_models.logits(model, first_batch(model))
    for name, update in ((name, source.updates[name]) for name in source.updates):
        x, y = calls[name]
        base_layer = model.get_base_model().get_submodule(name).get_base_layer()
        assert torch.equal(base_layer.inputs[-1], x * source.gain[name])
        weight = base_layer.dequantised().double() * source.gain[name].double()
        weight = weight + update.scaling * update.b.double() @ update.a.double()
        assert torch.allclose(y.double(), x.double() @ weight.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [merge_adapter, lambda model: model.merge_and_unload()], ids=["ours", "PEFT's"])
def test_nothing_is_merged_into_integers(merge, step):
    base, path = step
    model = load_adapter(quantised(base), path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"torch.int8 \(quantised\)"):
        merge(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_lora_layer_that_merges_by_itself():
    torch.manual_seed(0)
    layer = OwnLoraLayer(Int8Linear(nn.Linear(24, 16)))
    gain = 1 + 0.1 * torch.randn(24)
    attach_gain(layer, "default", gain)
    x = torch.randn(5, 24)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.dequantised() * gain + 3 * b @ a
    assert torch.allclose(layer(x), x @ expected.mT + layer.base_layer.bias, atol=1e-5)
    with pytest.raises(ValueError, match=r"OwnLoraLayer: merging .* not possible"):
        layer.merge()
    assert layer.merged_adapters == []


def test_two_gains_at_once_are_refused():
    layer = OwnLoraLayer(Int8Linear(nn.Linear(8, 8)))
    layer.add("second", 2, 1.0)
    attach_gain(layer, "default", torch.ones(8))
    layer(torch.randn(1, 8))
    attach_gain(layer, "second", torch.ones(8))
    with pytest.raises(ValueError, match=r"\['default', 'second'\] each have a column gain; they are steps"):
        layer(torch.randn(1, 8))
