"""A HiDe model that changes: tasks added and removed, settings changed, failures undone, without a trace."""

from __future__ import annotations

import hide_models as hm
import pytest
import torch
from helpers import refuses

from hpa_ext import NumericalError
from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.ablations import ablations
from hpa_ext.hide.fusion import fuse_into

ALL_FUSED = HiDeConfig(top_layers=0)


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


def test_adding_a_task_is_one_merge_of_the_layers_that_it_changes(monkeypatch):
    """Not a rebuild: what its expert leaves alone is not touched, and nothing is restored first."""
    from hpa_ext.hide import assembly

    model = hm.hide()
    merged = []
    monkeypatch.setattr(assembly, "fuse_into", lambda weight, update: merged.append(1) or fuse_into(weight, update))
    monkeypatch.setattr(assembly.Assembly, "_restore", lambda self, name: pytest.fail(f"restored {name}"))
    model.add("all", hm.expert(model.skeleton, "all", projector=False), hm.anchors_of(model.model, ("all",)))
    assert len(merged) == 14  # the linears of two fused layers, each once
    few = [name for name in hm.expert(model.skeleton, "few", projector=False).updates if ".layers.0.mlp." in name]
    expert = hm.expert(model.skeleton, "few", projector=False, modules=few)
    model.add("few", expert, hm.anchors_of(model.model, ("few",)))
    assert len(merged) == 14 + len(few) == 17


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_experts_that_leave_the_range_of_the_dtype_are_refused(form):
    """Merged into float16 they would be Inf, and every answer NaN."""
    base = hm.llava_of(torch.float16)
    state = hm.state_of(base)
    for large, config in (
        (hm.experts(base, scale=1e5), HiDeConfig(fused_form=form)),
        (hm.experts(base, scale=1e5), HiDeConfig(top_layers=3)),
    ):
        with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj: .* not finite in torch\.float16"):
            HiDeModel(base, large, hm.anchors_of(base), config)
        hm.assert_same_state(base, state)
    wide = hm.experts(base)
    for expert in wide.values():
        expert.projector.update({name: value.float() + 4e4 for name, value in expert.projector.items()})
    with pytest.raises(NumericalError, match="multi_modal_projector: projectors are not finite"):
        HiDeModel(base, wide, hm.anchors_of(base))
    hm.assert_same_state(base, state)


def test_settings_and_dtypes_of_a_wrong_type_are_refused():
    model = hm.hide()
    with refuses(TypeError, "config"):
        model.configure({"top_layers": 1})
    for wrong in (torch.int8, torch.float8_e4m3fn, "float32"):
        with refuses(TypeError, "expert_dtype"):
            hm.hide(expert_dtype=wrong)
