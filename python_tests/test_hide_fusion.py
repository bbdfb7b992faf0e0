"""Fused and routed layers against float64 sums over experts; the authors' factors."""

from __future__ import annotations

import copy

import hide_models as hm
import pytest
import torch
from helpers import refuses

from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.fusion import fuse, fuse_into
from hpa_ext.hide.layers import RoutedLinear


def updates(count=3, out_features=48, in_features=32, rank=4, seed=0, ranks=None):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        r = ranks[number] if ranks else rank
        a = torch.randn(r, in_features, generator=generator)
        found.append(ExpertUpdate(a, torch.randn(out_features, r, generator=generator), 0.5 + number))
    return found


def exact_sum(weight, found, coefficients):
    return weight.double() + sum(
        c * update.scaling * update.b.double() @ update.a.double()
        for c, update in zip(coefficients, found, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_weight_is_the_sum_of_experts_rounded_once(dtype):
    found, coefficients = updates(ranks=[1, 4, 7]), [1.0, 0.5, -0.25]
    weight = torch.randn(48, 32).to(dtype)
    before = weight.clone()
    fused = fuse_into(weight, fuse(found, coefficients, "delta"))
    exact = exact_sum(weight, found, coefficients)
    assert fused.dtype == dtype
    assert torch.equal(weight, before)
    limit = 2 * torch.finfo(torch.float32).eps * float(exact.abs().max()) * 4
    if dtype in (torch.bfloat16, torch.float16):
        # Within a unit of the last place of the exact sum, rounded.
        assert float((fused.double() - exact).abs().max() / exact.abs().max()) < torch.finfo(dtype).eps
        assert float((fused != exact.to(dtype)).float().mean()) < 0.01
    else:
        assert float((fused.double() - exact).abs().max()) < limit


def test_factors_are_the_authors_with_cross_terms():
    found, coefficients = updates(), [1.0, 1.0, 1.0]
    update = fuse(found, coefficients, "factors")
    a = sum(u.a.double() for u in found)
    b = sum(u.scaling * u.b.double() for u in found)
    torch.testing.assert_close((update.b @ update.a).double(), b @ a, rtol=1e-5, atol=1e-4)
    exact = exact_sum(torch.zeros(48, 32), found, coefficients)
    assert float((b @ a - exact).norm() / exact.norm()) > 0.5
    assert update.a.shape == (4, 32)
    # Each sum has the coefficients, so that they enter squared.
    uneven = [1.0, 0.5, -2.0]
    weighted = fuse(found, uneven, "factors")
    a = sum(c * u.a.double() for c, u in zip(uneven, found, strict=True))
    b = sum(c * u.scaling * u.b.double() for c, u in zip(uneven, found, strict=True))
    torch.testing.assert_close((weighted.b @ weighted.a).double(), b @ a, rtol=1e-5, atol=1e-4)
    one = fuse(found[:1], [1.0], "factors")
    torch.testing.assert_close(one.b @ one.a, fuse(found[:1], [1.0], "delta").b @ found[0].a)
    with refuses(ValueError, "fusion"):
        fuse(updates(ranks=[4, 4, 5]), coefficients, "factors")


def test_gains_add_up_in_the_fused_weight():
    found = [
        ExpertUpdate(u.a, u.b, u.scaling, 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(i)))
        for i, u in enumerate(updates(2))
    ]
    weight = torch.randn(48, 32)
    fused = fuse_into(weight, fuse(found, [1.0, 2.0], "delta"))
    gain = 1 + found[0].gain_change.double() + 2 * found[1].gain_change.double()
    exact = exact_sum(weight.double() * gain, found, [1.0, 2.0])
    torch.testing.assert_close(fused.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_holds_the_exact_sum_in_every_fused_layer(dtype):
    base = hm.llava_of(dtype)
    before = hm.state_of(base)
    found = hm.experts(base)
    coefficients = {"alpha": 1.0, "beta": 0.5, "gamma": 0.25}
    model = HiDeModel(base, found, hm.anchors_of(base), HiDeConfig(fusion_coefficients=coefficients))
    seen = 0
    for name in found["alpha"].updates:
        module = model.model.get_submodule(name)
        if ".layers.2." in name:
            assert isinstance(module, RoutedLinear)
            assert torch.equal(module.base.weight, before[f"{name}.weight"])
            continue
        assert type(module) is torch.nn.Linear  # no cost: a plain layer
        exact = before[f"{name}.weight"].double() + sum(
            coefficients[task] * hm.delta(expert.updates[name]) for task, expert in found.items()
        )
        error = float((module.weight.detach().double() - exact).abs().max() / exact.abs().max())
        assert error < 2 * torch.finfo(dtype).eps
        seen += 1
    assert seen == 14


def test_experts_with_other_ranks_and_modules_are_stacked_exactly():
    base = hm.llama_of()
    top = [name for name in hm.expert(base, "x").updates if ".layers.2." in name]
    adapters = {
        "a": hm.expert(base, "a", rank=2, seed=1),
        "b": hm.expert(base, "b", rank=5, seed=2, modules=top[:2]),
    }
    copy_of = copy.deepcopy(base)
    model = HiDeModel(base, adapters, hm.anchors_of(base, ("a", "b")), HiDeConfig(top_layers=3))
    for task, expert in adapters.items():
        weights = {
            name: copy_of.get_submodule(name).weight.double() + hm.delta(update)
            for name, update in expert.updates.items()
        }
        exact = hm.exact_copy(copy_of, weights)
        batch = hm.prompts(images=(0, 0, 0, 0))
        with model.routed(task):
            torch.testing.assert_close(model(**batch).logits.double(), exact(**batch).logits, rtol=1e-4, atol=1e-4)


def test_an_expert_of_the_output_head_is_routed_with_the_top_layer():
    base = hm.llama_of()
    a, b = torch.randn(2, 32), torch.randn(100, 2)
    head = Expert("a", {"lm_head": ExpertUpdate(a, b, 1.0)})
    weight = base.lm_head.weight.detach().clone()
    model = HiDeModel(base, {"a": head}, hm.anchors_of(base, ("a",)))
    assert list(model._assembly.routed_layers()) == ["lm_head"]
    merged = model.merge_and_unload("a")
    torch.testing.assert_close(merged.lm_head.weight, weight + b @ a)


def test_an_output_head_tied_to_the_embedding_is_refused():
    from tiny_models import llama

    base = llama(tie=True)
    head = Expert("a", {"lm_head": ExpertUpdate(torch.randn(2, 32), torch.randn(100, 2), 1.0)})
    with pytest.raises(ValueError, match="tied to the input embedding"):
        HiDeModel(base, {"a": head}, hm.anchors_of(base, ("a",)))


def test_weights_stored_the_other_way_round():
    """GPT-2's Conv1D holds [in, out]."""
    from tiny_models import gpt2

    base = gpt2()
    original = hm.state_of(base)
    found = {}
    for number, task in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(number)
        updates = {}
        for name in (f"transformer.h.{n}.{part}" for n in (0, 1) for part in ("attn.c_attn", "mlp.c_proj")):
            rows, columns = base.get_submodule(name).weight.shape
            a, b = torch.randn(3, rows, generator=generator), 0.1 * torch.randn(columns, 3, generator=generator)
            updates[name] = ExpertUpdate(a, b, 0.5)
        found[task] = Expert(task, updates)
    model = HiDeModel(base, found, hm.anchors_of(base, ("a", "b")))
    batch = hm.prompts(images=(0, 0), lengths=(6, 9))
    batch["input_ids"] %= 99
    name = "transformer.h.0.mlp.c_proj"
    exact = original[f"{name}.weight"].double() + sum(hm.delta(e.updates[name]).mT for e in found.values())
    torch.testing.assert_close(base.get_submodule(name).weight.double(), exact, rtol=1e-6, atol=1e-6)
    with model.routed("b"):
        expected = model(**batch).logits
    merged = model.merge_and_unload("b")
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    hm.assert_same_state(HiDeModel(gpt2(), found, hm.anchors_of(gpt2(), ("a", "b"))).unload(), original)


def test_a_weight_that_is_not_loaded_is_refused():
    base = hm.llava_of()
    found, anchors = hm.experts(base), hm.anchors_of(base)
    base.model.language_model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"layers\.0.*expected a weight that is loaded"):
        HiDeModel(base, found, anchors)
