"""harmonize_model on PeftModels: their update counts, their adapters are absorbed, what cannot be merged is refused."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from hpa_ext import HPAConfig, calibrate, harmonize_model
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import find_linears
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
    found = tiny_models.logits(adapted, batches[0])
    # From the factors, without the rounding of a new weight.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny_models.logits(in_place_of_base, batches[0]), found)
    assert torch.equal(tiny_models.logits(adapted.merge_and_unload(), batches[0]), found)
    assert 0 < len(report) < len(safety), "with the base as the old model, only adapted layers have changed"


@pytest.mark.parametrize("granularity", ["input", "output"])
@pytest.mark.parametrize("old_model", ["base", "copy", "remembered"])
def test_of_a_lora_no_new_weight_is_formed(granularity, old_model, monkeypatch):
    """Nearer to float64 than by way of a new bfloat16 weight, whose rounding counts as update."""
    config = HPAConfig(granularity=granularity)
    old = tiny_models.llama().bfloat16()
    adapted = tiny_models.with_lora(old, ["q_proj", "down_proj"])
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    exact, dense = copy.deepcopy(adapted).double(), copy.deepcopy(adapted).merge_and_unload()
    harmonize_model(old, dense, grams, grams, config, progress=False)
    before = {"base": adapted.get_base_model(), "copy": old, "remembered": RememberedWeights.of(old)}[old_model]
    changed = r".*(q|down)_proj"  # of the others both weights are taken
    with monkeypatch.context() as patched:
        patched.setattr(Linear, "weight", lambda self: pytest.fail(f"{self.name}: a new weight was formed"))
        harmonize_model(exact.get_base_model(), exact, grams, grams, config, modules=changed, progress=False)
        report = harmonize_model(before, adapted, grams, grams, config, modules=changed, progress=False)
    assert len(report) == 6 and all("low_rank" in layer.backend for layer in report.layers.values())
    of_exact, of_dense = (dict(model.named_parameters()) for model in (exact, dense))
    errors = {"factors": 0.0, "dense": 0.0}
    for name, weight in adapted.named_parameters():
        if name.endswith("base_layer.weight"):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            for kind, found in (("factors", weight), ("dense", of_dense[plain])):
                errors[kind] += float((found.double() - of_exact[name]).square().sum())
    assert 0 < errors["factors"] < errors["dense"]


def test_a_lora_on_another_weight_than_the_old_one_takes_both_weights():
    """The step changed the base as well, so the factors are not the whole update."""
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    with torch.no_grad():
        adapted.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer").weight[0, 0] += 1.0
    merged = copy.deepcopy(adapted).merge_and_unload()
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    for model in (adapted, merged):
        harmonize_model(old, model, grams, grams, modules=r".*layers\.1.*q_proj", progress=False)
    weights = [dict(model.named_parameters()) for model in (adapted, merged)]
    (written,) = (value for name, value in weights[0].items() if "layers.1.self_attn.q_proj.base_layer" in name)
    assert torch.equal(written, weights[1]["model.layers.1.self_attn.q_proj.weight"])


def test_the_sign_of_a_zero_is_retained_from_the_old_weight():
    """A base that has 0 where the old weight has -0 is another weight: what is retained is bit-identical."""
    old = tiny_models.llama()
    name = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        old.get_submodule(name).weight[::2] = -0.0
    adapted = tiny_models.with_lora(old, ["q_proj"])
    with torch.no_grad():
        adapted.get_base_model().get_submodule(name).base_layer.weight[::2] = 0.0
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    report = harmonize_model(old, adapted, grams, grams, HPAConfig(retain_min=50, retain_max=60), progress=False)
    retained = report.layers[name].retained
    assert retained.any()
    found = adapted.get_base_model().get_submodule(name).base_layer.weight[:, retained]
    assert torch.equal(found.view(torch.int32), old.get_submodule(name).weight[:, retained].view(torch.int32))


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
    merged = tiny_models.logits(adapted, batch)
    torch.testing.assert_close(merged, tiny_models.logits(expected, batch), rtol=1e-5, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(tiny_models.logits(adapted, batch), merged)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_alpha": 3}])
def test_lora_options_that_change_the_scaling(options):
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj", "v_proj"], **options)
    merged = copy.deepcopy(adapted).merge_and_unload()
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    harmonize_model(old, merged, grams, grams, progress=False)
    batch = tiny_models.batches(old, count=1)[0]
    found, expected = tiny_models.logits(adapted, batch), tiny_models.logits(merged, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    for name, linear in find_linears(adapted, r".*q_proj").items():
        assert torch.equal(linear.weight(), merged.get_submodule(name).weight)
    exact = copy.deepcopy(adapted).double()
    grams = calibrate(base, tiny_models.batches(base), progress=False)
    harmonize_model(base, adapted, grams, grams, progress=False)
    harmonize_model(exact.get_base_model(), exact, grams, grams, progress=False)
    for name in (f"model.layers.{index}.self_attn.q_proj" for index in range(3)):
        weight, wanted = (m.get_base_model().get_submodule(name).base_layer.weight for m in (adapted, exact))
        # Half a place of bfloat16, and what the coefficient's float32 sums may move.
        torch.testing.assert_close(weight.double(), wanted, rtol=2**-8 * 1.02, atol=1e-6)


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
