"""Experts from PEFT: directories, PeftModels, state dicts; what is refused."""

from __future__ import annotations

import hide_models as hm
import pytest
import torch
from helpers import refuses
from peft import PeftModel
from tiny_models import with_lora

from hpa_ext import NumericalError
from hpa_ext.hide import HiDeConfig, HiDeModel
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.training.lora import LANGUAGE_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def peft_models(base, tasks=hm.TASKS, **options):
    """One PeftModel for each task, projector included."""
    options = {"modules_to_save": ["multi_modal_projector"], **options}
    models = {}
    for number, task in enumerate(tasks):
        model = with_lora(base, LANGUAGE_LINEARS, seed=20 + number, **options)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        models[task] = model
    return models


def test_every_form_of_an_adapter_gives_the_same_expert(tmp_path):
    base = hm.llava_of()
    model = peft_models(base)["alpha"]
    model.save_pretrained(tmp_path / "alpha")
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    expert = read_expert("alpha", model, base)
    assert len(expert.updates) == 21
    assert len(expert.projector) == 4
    assert next(iter(expert.updates.values())).scaling == 2.0
    for source in (tmp_path / "alpha", str(tmp_path / "alpha"), (state, 2.0), (model, "default"), expert):
        hm.same_expert(read_expert("alpha", source, base), expert)


def test_each_expert_alone_is_peft_s_own_model(tmp_path):
    """Expand all, projectors routed, one task: the base with that task's adapter as PEFT runs it."""
    base = hm.llava_of()
    models = peft_models(base, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5})
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    config = HiDeConfig(top_layers=3, projector="routed")
    hide = HiDeModel(base, {task: tmp_path / task for task in models}, hm.anchors_of(base), config)
    batch = hm.prompts()
    for task, model in models.items():
        with torch.no_grad():
            expected = model(**batch).logits
        with hide.routed(task):
            torch.testing.assert_close(hide(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged = hide.merge_and_unload("beta")
    torch.testing.assert_close(merged(**batch).logits, models["beta"](**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_peft_model_with_all_adapters(tmp_path):
    base = hm.llava_of()
    models = peft_models(base, modules_to_save=None)
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    together = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "alpha", adapter_name="alpha")
    together.load_adapter(tmp_path / "beta", adapter_name="beta")
    anchors = hm.anchors_of(base, ("alpha", "beta"))
    one = HiDeModel(hm.llava_of(), together, anchors)
    other = HiDeModel(hm.llava_of(), [tmp_path / "alpha", tmp_path / "beta"], anchors)
    batch = hm.prompts()
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    with refuses(ValueError, "adapters"):
        HiDeModel(hm.llava_of(), [tmp_path / "alpha"], anchors)
    with refuses(ValueError, "adapters['x']"):
        read_expert("x", together, base)
    with refuses(ValueError, "adapters['x']"):
        read_expert("x", (together, "gamma"), base)


def test_the_order_is_that_of_the_anchors():
    base = hm.llava_of()
    found = hm.experts(base)
    anchors = hm.anchors_of(base).select(["gamma", "alpha", "beta"])
    model = HiDeModel(base, found, anchors)
    assert model.tasks == ["gamma", "alpha", "beta"]
    batch = hm.prompts()
    ours = hm.hide()
    torch.testing.assert_close(model.routing(**batch), ours.routing(**batch)[:, [2, 0, 1]])
    torch.testing.assert_close(model(**batch).logits, ours(**batch).logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_lora_or_does_not_fit_is_refused(tmp_path):
    base = hm.llava_of()
    dora = with_lora(base, LANGUAGE_LINEARS, use_dora=True)
    with pytest.raises(ValueError, match="LoRA variant"):
        read_expert("a", dora, base)
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        read_expert("a", tmp_path / "dora", base)
    biased = with_lora(base, LANGUAGE_LINEARS, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias"):
        read_expert("a", biased, base)
    biased.save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="lora_bias"):
        read_expert("a", tmp_path / "biased", base)
    tower = with_lora(base, r".*vision_tower.*(q|k)_proj")
    with pytest.raises(ValueError, match=r"vision_tower.*expected linears of the language model's decoder"):
        read_expert("a", tower, base)
    head = with_lora(base, LANGUAGE_LINEARS, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*expected parameters of the projector"):
        read_expert("a", head, base)
    merged = with_lora(base, LANGUAGE_LINEARS)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        read_expert("a", merged, base)
    with refuses(TypeError, "adapters['a']"):
        read_expert("a", 3, base)
    with pytest.raises(OSError, match="none"):
        read_expert("a", tmp_path / "none", base)
    with pytest.raises(ValueError, match="fits nowhere"):
        read_expert("a", ({"base_model.model.nowhere.lora_A.weight": torch.ones(1, 1)}, 1.0), base)
    name = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="lora_A alone"):
        read_expert("a", ({f"base_model.model.{name}.lora_A.weight": torch.ones(1, 32)}, 1.0), base)
    with pytest.raises(ValueError, match=r"B: expected \[32, 2\], got \[31, 2\]"):
        read_expert("a", Expert("a", {name: ExpertUpdate(torch.ones(2, 32), torch.ones(31, 2), 1.0)}), base)
    with pytest.raises(NumericalError, match="A of task 'a' holds NaN"):
        read_expert(
            "a", Expert("a", {name: ExpertUpdate(torch.full((2, 32), torch.nan), torch.ones(32, 2), 1.0)}), base
        )
    with pytest.raises(ValueError, match="expected LoRA updates, got none"):
        read_expert("a", Expert("a", {}), base)


def test_anchors_must_be_of_the_adapters_and_of_the_model_s_features():
    base = hm.llava_of()
    found = hm.experts(base)
    state = hm.state_of(base)
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found, hm.anchors_of(base, ("alpha", "beta")))
    with refuses(ValueError, "adapters"):
        HiDeModel(base, {"alpha": found["alpha"]}, hm.anchors_of(base))
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found)
    other = hm.anchors_of(base)
    other.features = {"image": "projected", "text": "clip, pooled"}
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found, other)
    with refuses(TypeError, "config"):
        HiDeModel(base, found, hm.anchors_of(base), {"top_layers": 1})
    hm.assert_same_state(base, state)
    assert HiDeModel(base, found, config=HiDeConfig(top_layers=0)).anchors is None


def test_numbers_that_are_no_lora_are_refused():
    base = hm.llava_of()
    name = "model.language_model.layers.0.self_attn.q_proj"
    for scaling in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}: scaling: expected a finite number"):
            read_expert("a", Expert("a", {name: ExpertUpdate(torch.ones(2, 32), torch.ones(32, 2), scaling)}), base)
    whole = torch.ones(2, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name}: A: expected floats, got torch.int32"):
        read_expert("a", Expert("a", {name: ExpertUpdate(whole, whole.mT, 1.0)}), base)
    expert = hm.expert(base, "a")
    first = next(iter(expert.projector))
    expert.projector[first] = expert.projector[first].int()
    with pytest.raises(ValueError, match=r"expected floats .*got torch\.int32"):
        read_expert("a", expert, base)
