"""Fused layers: exact sums, the authors' factors, adding and removing without a trace, quantised weights."""

from __future__ import annotations

import copy

import hide_models as hm
import pytest
import torch
from helpers import refuses

from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.ablations import ablations
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.fusion import fuse, fuse_into
from hpa_ext.hide.layers import FusedAdapterLinear, RoutedLinear

ALL_FUSED = HiDeConfig(top_layers=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [HiDeConfig(), ALL_FUSED, HiDeConfig(projector="mean")], ids=str)
def test_adding_and_removing_leave_no_trace(dtype, config):
    """In bfloat16 subtracting what was added would; so would adding to a rounded sum."""
    original = hm.state_of(hm.llava_of(dtype))
    model = hm.hide(config=config, dtype=dtype)
    state = hm.state_of(model.model)
    extra = hm.expert(model.skeleton, "delta", seed=99, projector=False)
    for _ in range(3):
        model.add("delta", extra, hm.anchors_of(model.model, ("delta",)))
        assert model.tasks == ["alpha", "beta", "gamma", "delta"]
        model.remove("delta")
    hm.assert_same_state(model.model, state)
    # Taken from the middle, it is as if it had never come.
    model.remove("beta")
    base = hm.llava_of(dtype)
    found = hm.experts(base)
    del found["beta"]
    without = HiDeModel(base, found, hm.anchors_of(base).select(["alpha", "gamma"]), config)
    hm.assert_same_state(model.model, hm.state_of(without.model))
    hm.assert_same_state(model.unload(), original)


def test_all_tasks_may_go_and_come_again():
    model = hm.hide()
    found = hm.experts(model.skeleton, projector=False)
    anchors = hm.anchors_of(model.model)
    for task in hm.TASKS:
        model.remove(task)
    assert model.tasks == []
    assert torch.isfinite(model(**hm.prompts()).logits).all()
    for task in hm.TASKS:
        model.add(task, found[task], anchors)
    assert model.routing(**hm.prompts()).shape == (4, 3)


def test_base_weights_may_be_read_again_instead_of_kept():
    base = hm.llava_of(torch.bfloat16)
    original = hm.state_of(base)
    model = HiDeModel(base, hm.experts(base), hm.anchors_of(base), base_weights=lambda name: original[name])
    assert model._assembly._kept == {}
    kept = hm.hide(dtype=torch.bfloat16)
    model.remove("alpha")
    kept.remove("alpha")
    hm.assert_same_state(model.model, hm.state_of(kept.model))
    hm.assert_same_state(model.unload(), original)
    base = hm.llava_of()
    with pytest.raises(ValueError, match="base_weights: expected the weight of"):
        HiDeModel(base, hm.experts(base), hm.anchors_of(base), base_weights=lambda name: base.state_dict()[name] + 1)


def test_a_failure_while_building_leaves_the_base(monkeypatch):
    from hpa_ext.hide import assembly

    base = hm.llava_of()
    state = hm.state_of(base)
    found, anchors = hm.experts(base), hm.anchors_of(base)
    calls = []

    def failing(weight, update):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no room")
        return fuse_into(weight, update)

    monkeypatch.setattr(assembly, "fuse_into", failing)
    with pytest.raises(MemoryError):
        HiDeModel(base, found, anchors)
    hm.assert_same_state(base, state)
    assert not base._forward_pre_hooks
    assert "generate" not in vars(base)
    HiDeModel(base, found, anchors)


def test_coefficients_of_tasks_that_come_and_go():
    model = hm.hide(config=HiDeConfig(fusion_coefficients={"alpha": 0.5, "beta": 0.25}))
    model.remove("beta")
    model.configure(model.config.replace(temperature=0.2))
    extra = hm.expert(model.skeleton, "delta", seed=99, projector=False)
    model.add("delta", extra, hm.anchors_of(model.model, ("delta",)), coefficient=0.125)
    assert [model.config.coefficient(task) for task in model.tasks] == [0.5, 1.0, 0.125]
    name = "model.language_model.layers.0.mlp.up_proj"
    start = hm.llava_of().get_submodule(name).weight.detach().double()
    exact = start + sum(
        model.config.coefficient(expert.task) * hm.delta(expert.updates[name]) for expert in model.experts
    )
    torch.testing.assert_close(model.model.get_submodule(name).weight.detach().double(), exact, rtol=1e-5, atol=1e-6)


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


def test_ablations_change_the_roles_of_layers():
    model = hm.hide()
    batch = hm.prompts()
    logits = {}
    roles = {}
    for name, config in ablations(3).items():
        model.configure(config)
        logits[name] = model(**batch).logits
        roles[name] = {int(key.split(".")[3]) for key in model._assembly.routed_layers()}
    assert roles["HiDe"] == {2}
    assert roles["merge all"] == roles["merge lower"] == set()
    assert roles["expand all"] == {0, 1, 2}
    assert roles["expand lower"] == {0, 1}
    for name in ("merge all", "merge lower", "expand all", "expand lower", "factors", "image alone", "authors"):
        assert not torch.allclose(logits[name], logits["HiDe"], atol=1e-4), name
    model.configure(HiDeConfig())
    assert torch.equal(model(**batch).logits, logits["HiDe"])
    fresh = hm.hide(config=ablations(3)["expand lower"])
    assert torch.equal(fresh(**batch).logits, logits["expand lower"])


def test_nothing_changes_if_a_change_fails():
    model = hm.hide()
    state = hm.state_of(model.model)
    uneven = hm.expert(model.skeleton, "delta", rank=5, projector=False)
    anchors = hm.anchors_of(model.model, ("delta",))
    model.configure(HiDeConfig(fusion="factors"))
    factors = hm.state_of(model.model)
    with refuses(ValueError, "fusion"):
        model.add("delta", uneven, anchors)
    hm.assert_same_state(model.model, factors)
    assert model.tasks == list(hm.TASKS)
    model.configure(HiDeConfig())
    hm.assert_same_state(model.model, state)
    with refuses(ValueError, "top_layers"):
        model.configure(HiDeConfig(top_layers=4))
    with refuses(ValueError, "fusion_coefficients"):
        model.configure(HiDeConfig(fusion_coefficients={"typo": 1.0}))
    with refuses(ValueError, "task"):
        model.remove("none")
    with refuses(ValueError, "task"):
        model.add("alpha", uneven, anchors)
    with refuses(ValueError, "anchors"):
        model.add("delta", uneven)
    hm.assert_same_state(model.model, state)


def test_a_failure_in_the_middle_is_undone(monkeypatch):
    from hpa_ext.hide import assembly

    model = hm.hide()
    state = hm.state_of(model.model)
    calls = []

    def failing(weight, update):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no room")
        return fuse_into(weight, update)

    monkeypatch.setattr(assembly, "fuse_into", failing)
    with pytest.raises(MemoryError):
        extra = hm.expert(model.skeleton, "delta", seed=5, projector=False)
        model.add("delta", extra, hm.anchors_of(model.model, ("delta",)))
    assert len(calls) > 5
    hm.assert_same_state(model.model, state)
    assert model.tasks == list(hm.TASKS)


@pytest.mark.parametrize("how", ["fused", "mean", "last", "routed", "base"])
def test_projectors(how):
    base = hm.llava_of()
    original = hm.state_of(base)
    found = hm.experts(base)
    model = HiDeModel(base, found, hm.anchors_of(base), HiDeConfig(projector=how, fusion_coefficients=0.5))
    name = "model.multi_modal_projector.linear_1.weight"
    start = original[name].double()
    given = [expert.projector[name].double() for expert in found.values()]
    if how == "routed":
        batch = hm.prompts()
        assert len(model.model.model.multi_modal_projector.projectors) == 3
        own = []
        for task in hm.TASKS:
            with model.routed(task):
                own.append(model.model.get_image_features(batch["pixel_values"]).pooler_output)
        weights = model.routing(**batch)
        mixed = [sum(w * own[c][i] for c, w in enumerate(weights[i])) for i in range(4)]
        with model.routed(weights):
            model(**batch)
        assert not torch.allclose(own[0][0], own[1][0], atol=1e-4)
        with model.state.generating(_prompt(model, batch)):
            got = model.model.get_image_features(batch["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.stack(list(got)), torch.stack(mixed), rtol=1e-5, atol=1e-5)
    else:
        expected = {
            "fused": start + 0.5 * sum(value - start for value in given),
            "mean": sum(given) / 3,
            "last": given[-1],
            "base": start,
        }[how]
        torch.testing.assert_close(base.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-7)
    hm.assert_same_state(model.unload(), original)


def _prompt(model, batch):
    from hpa_ext.hide.prompts import prompt_of

    return prompt_of(model.model, batch)


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


def test_a_model_moved_between_changes_stays_whole():
    model = hm.hide(config=HiDeConfig(projector="routed"))
    original = hm.state_of(hm.llava_of())
    model.to(torch.float64)
    model.remove("beta")
    batch = hm.prompts()
    batch["pixel_values"] = batch["pixel_values"].double()
    assert torch.isfinite(model(**batch).logits).all()
    restored = model.unload()
    assert {value.dtype for value in restored.state_dict().values() if value.is_floating_point()} == {torch.float64}
    for name, value in restored.state_dict().items():
        assert torch.equal(value.float(), original[name].float()), name


def test_a_weight_that_is_not_loaded_is_refused():
    base = hm.llava_of()
    found, anchors = hm.experts(base), hm.anchors_of(base)
    base.model.language_model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"layers\.0.*expected a weight that is loaded"):
        HiDeModel(base, found, anchors)


def test_merging_into_a_plain_model():
    base = hm.llava_of()
    original = hm.state_of(base)
    found = hm.experts(base)
    batch = hm.prompts()
    model = HiDeModel(base, found, hm.anchors_of(base))
    with model.routed("beta"):
        expected = model(**batch).logits
    merged = model.merge_and_unload("beta")
    assert set(merged.state_dict()) == set(original)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    base = hm.llava_of()
    fused = HiDeModel(base, found, hm.anchors_of(base)).merge_and_unload()
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    assert torch.equal(fused.state_dict()[name], original[name])
    lower = HiDeModel(base_of := hm.llava_of(), found, config=HiDeConfig(top_role="none"))
    torch.testing.assert_close(fused(**batch).logits, lower(**batch).logits)
    assert base_of is lower.model
