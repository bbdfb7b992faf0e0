"""harmonize_model on PeftModels: their update counts, their adapters are absorbed, what cannot be merged is refused."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from hpa_ext import HPAConfig, calibrate, harmonize_model
from hpa_ext.models.linear import Linear
from hpa_ext.models.remembered import RememberedWeights

MAKERS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "llava": tiny_models.llava}
LORA_TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "llava": r".*language.*(q|down)_proj"}


@pytest.mark.parametrize("kind", MAKERS)
def test_peft_model_equals_its_merged_form(kind):
    old = MAKERS[kind]()
    adapted = tiny_models.with_lora(old, LORA_TARGETS[kind])
    merged = copy.deepcopy(adapted).merge_and_unload()
    batches = tiny_models.batches(old)
    safety = calibrate(old, batches, progress=False)
    task = calibrate(merged, batches, progress=False)
    assert not torch.equal(tiny_models.logits(merged, batches[0]), tiny_models.logits(old, batches[0]))
    in_place_of_base = copy.deepcopy(adapted)
    harmonize_model(old, merged, safety, task, progress=False)
    harmonize_model(old, adapted, safety, task, progress=False)
    report = harmonize_model(in_place_of_base.get_base_model(), in_place_of_base, safety, task, progress=False)
    expected = tiny_models.logits(merged, batches[0])
    assert torch.equal(tiny_models.logits(adapted, batches[0]), expected)
    # From the factors, without the rounding of a new weight.
    torch.testing.assert_close(tiny_models.logits(in_place_of_base, batches[0]), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny_models.logits(adapted.merge_and_unload(), batches[0]), expected)
    assert 0 < len(report) < len(safety), "with the base as the old model, only adapted layers have changed"


@pytest.mark.parametrize("granularity", ["input", "output"])
def test_with_the_base_as_the_old_model_no_new_weight_is_formed(granularity, monkeypatch):
    """Nearer to float64 than by way of a new bfloat16 weight, whose rounding counts as update."""
    config = HPAConfig(granularity=granularity)
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj", "down_proj"])
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    models = {"exact": copy.deepcopy(adapted).double(), "factors": copy.deepcopy(adapted).bfloat16()}
    models["exact"].load_state_dict({name: value.double() for name, value in models["factors"].state_dict().items()})
    models["dense"] = copy.deepcopy(models["factors"])
    dense_old = copy.deepcopy(models["factors"].get_base_model())
    harmonize_model(RememberedWeights.of(_unadapted(dense_old)), models["dense"], grams, grams, config, progress=False)
    monkeypatch.setattr(Linear, "weight", lambda self: pytest.fail(f"{self.name}: a new weight was formed"))
    for kind in ("exact", "factors"):
        model = models[kind]
        report = harmonize_model(model.get_base_model(), model, grams, grams, config, progress=False)
        assert len(report) == 6
    weights = {kind: dict(model.named_parameters()) for kind, model in models.items()}
    errors = {"factors": 0.0, "dense": 0.0}
    for name, exact in weights["exact"].items():
        if name.endswith("base_layer.weight"):
            for kind in errors:
                errors[kind] += float((weights[kind][name].double() - exact).square().sum())
    assert 0 < errors["factors"] < errors["dense"]


def _unadapted(model):
    """The same model with an adapter that does nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return model


def test_peft_model_can_be_tuned_further():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    parameters = dict(adapted.named_parameters())
    assert all(not value.any() for name, value in parameters.items() if "lora_B" in name)
    assert all(value.any() for name, value in parameters.items() if "lora_A" in name)
    adapted.train()
    batch = tiny_models.batches(old, count=1)[0]
    adapted(**batch).loss.backward()
    assert any(value.grad is not None and value.grad.any() for name, value in parameters.items() if "lora_B" in name)


def test_merged_in_place_peft_model_counts_as_merged():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    expected = copy.deepcopy(adapted)
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, expected, grams, grams, progress=False)
    adapted.merge_adapter()
    harmonize_model(old, adapted, grams, grams, progress=False)
    batch = tiny_models.batches(old, count=1)[0]
    assert torch.equal(tiny_models.logits(adapted, batch), tiny_models.logits(expected, batch))
    adapted.unmerge_adapter()
    assert torch.equal(tiny_models.logits(adapted, batch), tiny_models.logits(expected, batch))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_alpha": 3}])
def test_lora_options_that_change_the_scaling(options):
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj", "v_proj"], **options)
    merged = copy.deepcopy(adapted).merge_and_unload()
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    harmonize_model(old, merged, grams, grams, progress=False)
    batch = tiny_models.batches(old, count=1)[0]
    assert torch.equal(tiny_models.logits(adapted, batch), tiny_models.logits(merged, batch))


@pytest.mark.parametrize(
    ("make", "target", "options", "message"),
    [
        (tiny_models.llama, "q_proj", {"use_dora": True}, r"layers\.0\.self_attn\.q_proj: adapter 'default' .*variant"),
        (tiny_models.gpt2, "c_attn", {"lora_bias": True}, r"h\.0\.attn\.c_attn: adapter 'default' has lora_bias"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused_by_name(make, target, options, message):
    old = make()
    adapted = tiny_models.with_lora(old, [target], **options)
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    before = tiny_models.snapshot(adapted)
    with pytest.raises(ValueError, match=message):
        harmonize_model(old, adapted, grams, grams, progress=False)
    tiny_models.assert_unchanged(adapted, before)


def test_trained_copies_of_peft_are_harmonized_with_the_base_as_the_old_model():
    """modules_to_save: the base model holds the trained copy too, so the old weight is that of original_module."""
    from peft import LoraConfig, get_peft_model

    old = tiny_models.llama()
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(old), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    adapted.eval()
    in_place_of_base = copy.deepcopy(adapted)
    batches = tiny_models.batches(old)
    grams = calibrate(old, batches, progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    report = harmonize_model(in_place_of_base.get_base_model(), in_place_of_base, grams, grams, progress=False)
    assert sum(name.endswith("down_proj") for name in report.layers) == 3
    expected = tiny_models.logits(adapted, batches[0])
    torch.testing.assert_close(tiny_models.logits(in_place_of_base, batches[0]), expected, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_round_the_adapters_update():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    under_autocast = copy.deepcopy(adapted)
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        harmonize_model(old, under_autocast, grams, grams, progress=False)
    tiny_models.assert_unchanged(under_autocast, tiny_models.snapshot(adapted))


def shared_with_adapters(targets):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
            self.layers[1].weight = self.layers[0].weight

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    old = Shared()
    return old, tiny_models.with_lora(old, targets)


@pytest.mark.parametrize("targets", [["layers.0"], ["layers.1"], ["layers.0", "layers.1"]])
def test_an_adapter_on_one_name_of_a_shared_weight_is_refused(targets):
    old, adapted = shared_with_adapters(targets)
    grams = calibrate(old, [torch.randn(40, 8)], progress=False)
    before = tiny_models.snapshot(adapted)
    with pytest.raises(ValueError, match=r"layers\.1: shares its weight with layers\.0, and an adapter"):
        harmonize_model(old, adapted, grams, grams, progress=False)
    tiny_models.assert_unchanged(adapted, before)


def test_old_models_adapter_counts_and_others_do_not():
    """Step two: the old model is itself a PeftModel, and each carries adapters that are inactive or disabled."""
    base = tiny_models.llama()
    old, new = tiny_models.with_lora(base, ["q_proj"], seed=2), tiny_models.with_lora(base, ["q_proj"], seed=3)
    plain_old, plain_new = (copy.deepcopy(model).merge_and_unload() for model in (old, new))
    new.add_adapter("idle", new.peft_config["default"])
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "lora_B.idle" in name:
                parameter.fill_(0.3)
    grams = calibrate(base, tiny_models.batches(base), progress=False)
    batch = tiny_models.batches(base, count=1)[0]
    harmonize_model(old, new, grams, grams, progress=False)
    harmonize_model(plain_old, plain_new, grams, grams, progress=False)
    assert torch.equal(tiny_models.logits(new, batch), tiny_models.logits(plain_new, batch))
    disabled = tiny_models.with_lora(base, ["q_proj"], seed=3)
    disabled.base_model.disable_adapter_layers()
    report = harmonize_model(base, disabled, grams, grams, progress=False)
    assert {layer.update_norm for layer in report.layers.values()} == {0.0}


def test_half_precision_adapters_are_rounded_once():
    base = tiny_models.llama().bfloat16()
    adapted = tiny_models.with_lora(base, ["q_proj"])
    merged = copy.deepcopy(adapted).merge_and_unload()
    grams = calibrate(base, tiny_models.batches(base), progress=False)
    harmonize_model(base, adapted, grams, grams, progress=False)
    harmonize_model(base, merged, grams, grams, progress=False)
    for name in (f"model.layers.{index}.self_attn.q_proj" for index in range(3)):
        weight = adapted.get_base_model().get_submodule(name).base_layer.weight
        assert torch.equal(weight, merged.get_submodule(name).weight)


def test_merged_and_disabled_adapters_are_refused():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    adapted.merge_adapter()
    for module in adapted.modules():
        if hasattr(module, "merged_adapters") and hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
    with pytest.raises(ValueError, match=r"q_proj: its adapters \['default'\] are merged and also disabled"):
        harmonize_model(old, adapted, grams, grams, progress=False)


def test_merged_adapters_are_declared_absorbed():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    adapted.merge_adapter()
    harmonize_model(old, adapted, grams, grams, progress=False)
    assert adapted.get_base_model().model.layers[0].self_attn.q_proj.merged_adapters == []


def test_other_adapters_than_lora_are_refused_by_name():
    from peft import IA3Config, get_peft_model

    old = tiny_models.llama()
    adapted = get_peft_model(copy.deepcopy(old), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    with pytest.raises(TypeError, match=r"k_proj: expected plain layers or LoRA"):
        harmonize_model(old, adapted, grams, grams, progress=False)
