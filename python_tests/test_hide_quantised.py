"""HiDe on weights that cannot be added to: the fused part is kept as an adapter beside them."""

from __future__ import annotations

import copy

import hide_models as hm
import pytest
import torch

from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.layers import FusedAdapterLinear


class Int8Linear(torch.nn.Linear):
    """A linear of a quantised model: its weight cannot be added to."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised():
    model = hm.llava_of()
    for name in hm.expert(model, "any").updates:
        hm_parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(hm_parent), child, Int8Linear(model.get_submodule(name)))
    return model


def test_a_quantised_base_keeps_the_fused_part_as_an_adapter():
    base = quantised()
    found = hm.experts(base)
    anchors = hm.anchors_of(base)
    plain = copy.deepcopy(base)
    for name in found["alpha"].updates:
        linear = plain.get_submodule(name)
        dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        dense.weight.data = linear.weight.float() * linear.scale
        plain.set_submodule(name, dense)
    model = HiDeModel(base, found, anchors)
    dense_model = HiDeModel(plain, found, hm.anchors_of(plain))
    layer = model.model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert isinstance(layer, FusedAdapterLinear)
    batch = hm.prompts()
    torch.testing.assert_close(model(**batch).logits, dense_model(**batch).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"fused_form: 'merged' expected plain weights"):
        model.configure(HiDeConfig(fused_form="merged"))
    with pytest.raises(ValueError, match="expected a plain weight to merge into"):
        model.merge_and_unload("alpha")
    torch.testing.assert_close(model(**batch).logits, dense_model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert model.unload() is base
    assert isinstance(base.get_submodule("model.language_model.layers.0.self_attn.q_proj"), Int8Linear)


def test_an_adapter_beside_the_weights_equals_the_merged_form():
    merged, beside = hm.hide(), hm.hide(config=HiDeConfig(fused_form="adapter"))
    batch = hm.prompts()
    torch.testing.assert_close(beside(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-4)


def test_float8_is_quantised_too():
    """Its scale lies beside the weight, so that adding to the weight would add something else."""
    base = hm.llava_of()
    name = "model.language_model.layers.0.self_attn.q_proj"
    weight = base.get_submodule(name).weight
    base.get_submodule(name).weight = torch.nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    before = hm.state_of(base)
    model = HiDeModel(base, hm.experts(base), hm.anchors_of(base))
    assert isinstance(model.model.get_submodule(name), FusedAdapterLinear)
    assert model.model.get_submodule(name).a.dtype == torch.float32
    with pytest.raises(ValueError, match="expected a plain weight to merge into"):
        model.merge_and_unload()
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[key].float(), value.float()) for key, value in before.items())
