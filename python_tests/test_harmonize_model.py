"""harmonize_model on transformers models, with and without PEFT; nothing is written when anything is refused."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from hpa_ext import Gram, HPAConfig, NumericalError, calibrate, harmonize, harmonize_model

MAKERS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "llava": tiny_models.llava}
LORA_TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "llava": r".*language.*(q|down)_proj"}


def setting(make):
    old = make()
    new = tiny_models.tuned(old)
    safety = calibrate(old, tiny_models.batches(old, seed=5), progress=False)
    task = calibrate(new, tiny_models.batches(new, seed=6), progress=False)
    return old, new, safety, task


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(before[name])), name


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_is_harmonized_at_its_depth(kind):
    old, new, safety, task = setting(MAKERS[kind])
    before_old, before = snapshot(old), snapshot(new)
    report = harmonize_model(old, new, safety, task, progress=False)
    layers = {"llama": 3, "gpt2": 2, "llava": 3}[kind]
    assert list(report.layers) == list(safety)
    for name, layer in report.layers.items():
        index = next(int(part) for part in name.split(".") if part.isdigit())
        depth = (index + 1) / layers
        assert layer.depth == depth
        transpose = kind == "gpt2"
        old_w, new_w = (w[f"{name}.weight"].T if transpose else w[f"{name}.weight"] for w in (before_old, before))
        expected = harmonize(old_w, new_w, (safety[name], task[name]), depth)
        result = new.state_dict()[f"{name}.weight"]
        assert torch.equal(result.T if transpose else result, expected), name
    others = {key for key in before if key.removesuffix(".weight") not in report.layers}
    for key in others:
        assert torch.equal(new.state_dict()[key], before[key]), f"{key} is no linear of the decoder"
    assert_unchanged(old, before_old)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report) and all(
        name in text for name, text in zip(report.layers, lines[2:], strict=True)
    )
    assert report.to_dict()["config"]["retain_max"] == 15.0


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
    assert torch.equal(tiny_models.logits(in_place_of_base, batches[0]), expected)
    assert torch.equal(tiny_models.logits(adapted.merge_and_unload(), batches[0]), expected)
    assert 0 < len(report) < len(safety), "with the base as the old model, only adapted layers have changed"


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
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=message):
        harmonize_model(old, adapted, grams, grams, progress=False)
    assert_unchanged(adapted, before)


def test_shared_weights_are_handled_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(4)])
            self.layers[2].weight = self.layers[0].weight

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    old = Shared()
    new = copy.deepcopy(old)
    for index in (0, 1, 3):
        new.layers[index].weight.data += 0.1 * torch.randn(8, 8)
    assert new.layers[2].weight is new.layers[0].weight
    grams = calibrate(old, [torch.randn(40, 8)], progress=False)
    expected = harmonize(old.layers[0], new.layers[0], (grams["layers.0"], grams["layers.0"]), 0.25)
    report = harmonize_model(old, new, grams, grams, progress=False)
    assert report.shared == {"layers.2": "layers.0"} and list(report.layers) == ["layers.0", "layers.1", "layers.3"]
    assert torch.equal(new.layers[2].weight, expected) and "layers.2" in str(report)


def test_tied_output_head_can_be_chosen_and_stays_tied():
    old = tiny_models.llama(tie=True)
    new = tiny_models.tuned(old)
    new.tie_weights()
    grams = calibrate(old, tiny_models.batches(old), modules="lm_head", progress=False)
    report = harmonize_model(old, new, grams, grams, modules="lm_head", progress=False)
    assert report["lm_head"].depth == 1.0
    assert new.lm_head.weight.data_ptr() == new.model.embed_tokens.weight.data_ptr()


def test_experts_without_linear_modules_are_reported():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return self.gate(x)

    old = Experts()
    new = tiny_models.tuned(old)
    grams = calibrate(old, [torch.randn(30, 8)], progress=False)
    report = harmonize_model(old, new, grams, grams, progress=False)
    assert report.not_covered == ["experts"] and "not covered: experts" in str(report)


def test_settings_reach_every_layer():
    old, new, safety, task = setting(tiny_models.llama)
    config = HPAConfig(retain_min=0.0, retain_max=0.0, orthogonal=False)
    before = snapshot(new)
    harmonize_model(old, new, safety, task, config, progress=False)
    assert_unchanged(new, before)  # nothing retained and nothing adjusted is sequential fine-tuning


def test_rescues_are_reported():
    old, new, safety, task = setting(tiny_models.llama)
    name = "model.layers.1.mlp.down_proj"
    x = torch.randn(200, 2) @ torch.randn(2, 48)  # two directions only: float32 cannot factor it almost undamped
    report = harmonize_model(
        old, new, {**safety, name: Gram(48).update(x)}, task, HPAConfig(damping=1e-5), progress=False
    )
    assert report[name].precision_bits["safety"] == 64
    assert any(text.startswith("safety Gram was factored in float64 in") for text in report.warnings)
    indefinite = torch.eye(48)
    indefinite[0, 1] = indefinite[1, 0] = 1.0001
    report = harmonize_model(
        old, tiny_models.tuned(old), {**safety, name: indefinite}, task, HPAConfig(damping=1e-5), progress=False
    )
    assert report[name].damping_used["safety"] == pytest.approx(1e-3)
    assert f"warning: safety Gram needed more damping in 1 layer, such as {name}" in str(report)


def bad_calls():
    old, new, safety, task = setting(tiny_models.llama)
    name = "model.layers.1.mlp.up_proj"
    missing = {key: value for key, value in task.items() if key != name}
    empty = {**safety, name: Gram(32)}
    narrow = {**safety, name: Gram(7).update(torch.randn(3, 7))}
    other = tiny_models.gpt2()
    poisoned = copy.deepcopy(new)
    poisoned.get_submodule(name).weight.data[0, 0] = torch.nan
    half = copy.deepcopy(new)
    half.get_submodule(name).weight.data = half.get_submodule(name).weight.data.half()
    meta = copy.deepcopy(new).to("meta")
    quantised = copy.deepcopy(new)
    quantised.get_submodule(name).weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    return {
        "missing gram": (old, new, safety, missing, {}, ValueError, rf"{name}: no Gram in task"),
        "no grams": (old, new, {}, task, {}, ValueError, "no Gram in safety; it is empty"),
        "no tokens": (old, new, empty, task, {}, ValueError, rf"{name}: its Gram in safety has counted no tokens"),
        "gram width": (old, new, narrow, task, {}, ValueError, rf"{name}: gram.safety: expected \[32, 32\]"),
        "other model": (other, new, safety, task, {}, ValueError, "is in model_new but not in model_old"),
        "same model": (new, new, safety, task, {}, ValueError, "share this weight"),
        "nan": (old, poisoned, safety, task, {}, NumericalError, rf"{name}: layer_new: .*NaN"),
        "dtype": (old, half, safety, task, {}, TypeError, rf"{name}: w_new: expected dtype"),
        "meta": (old, meta, safety, task, {}, ValueError, "its weight is not loaded"),
        "quantised": (old, quantised, safety, task, {}, ValueError, rf"{name}: expected a floating-point weight"),
        "config": (old, new, safety, task, {"config": 3}, TypeError, "config: expected an HPAConfig"),
        "modules": (old, new, safety, task, {"modules": "no"}, ValueError, "modules: no linear layer"),
    }


@pytest.mark.parametrize("case", bad_calls().keys())
def test_bad_input_leaves_the_model_unchanged(case):
    old, new, safety, task, options, error, message = bad_calls()[case]
    before = snapshot(new)
    with pytest.raises(error, match=message):
        harmonize_model(old, new, safety, task, progress=False, **options)
    if case != "meta":
        assert_unchanged(new, before)


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
    assert torch.equal(tiny_models.logits(in_place_of_base, batches[0]), tiny_models.logits(adapted, batches[0]))


def test_autocast_does_not_round_the_adapters_update():
    old = tiny_models.llama()
    adapted = tiny_models.with_lora(old, ["q_proj"])
    under_autocast = copy.deepcopy(adapted)
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    harmonize_model(old, adapted, grams, grams, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        harmonize_model(old, under_autocast, grams, grams, progress=False)
    assert_unchanged(under_autocast, snapshot(adapted))


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
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=r"layers\.1: shares its weight with layers\.0, and an adapter"):
        harmonize_model(old, adapted, grams, grams, progress=False)
    assert_unchanged(adapted, before)


def test_an_expanded_weight_is_refused_before_anything_is_written():
    old, new, safety, task = setting(tiny_models.llama)
    linear = new.model.layers[2].mlp.down_proj
    linear.weight = nn.Parameter(torch.randn(1, 48).expand(32, 48), requires_grad=False)
    before = snapshot(new)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj: its weight is an expanded view"):
        harmonize_model(old, new, safety, task, progress=False)
    assert_unchanged(new, before)


def test_routers_and_experts_of_a_mixture_are_not_covered():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    old = MixtralForCausalLM(config).eval()
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    report = harmonize_model(old, tiny_models.tuned(old), grams, grams, progress=False)
    mlp = "model.layers.0.mlp."
    assert sorted(report.not_covered) == [mlp + "experts.down_proj", mlp + "experts.gate_up_proj", mlp + "gate.weight"]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, "path", r"model_old: expected an nn\.Module, got str"),
        (1, None, r"model_new: expected an nn\.Module, got NoneType"),
        (2, None, "safety: expected a mapping of module names to Grams, got NoneType"),
        (3, [], "task: expected a mapping of module names to Grams, got list"),
    ],
)
def test_arguments_of_another_kind(position, value, message):
    arguments = list(setting(tiny_models.llama))
    arguments[position] = value
    with pytest.raises(TypeError, match=message):
        harmonize_model(*arguments, progress=False)


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


def test_a_quantised_old_model_is_refused():
    old, new, safety, task = setting(tiny_models.llama)
    name = "model.layers.1.mlp.up_proj"
    old.get_submodule(name).weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=rf"{name}: expected a floating-point weight.*quantised"):
        harmonize_model(old, new, safety, task, progress=False)


def test_interrupt_waits_until_the_model_is_whole(monkeypatch):
    import os
    import signal

    from hpa_ext.hpa.layer import LayerPlan

    old, new, safety, task = setting(tiny_models.llama)
    expected = copy.deepcopy(new)
    harmonize_model(old, expected, safety, task, progress=False)
    merge, merged = LayerPlan.merge, []

    def interrupted(self, *args, **kwargs):
        merged.append(merge(self, *args, **kwargs))
        if len(merged) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LayerPlan, "merge", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        harmonize_model(old, new, safety, task, progress=False)
    assert len(merged) == len(safety) and signal.getsignal(signal.SIGINT) is handler
    assert_unchanged(new, snapshot(expected))


def test_interrupt_while_scoring_changes_nothing(monkeypatch):
    import hpa_ext.hpa.model as module

    old, new, safety, task = setting(tiny_models.llama)
    before, scored = snapshot(new), []

    def interrupted(*args, **kwargs):
        scored.append(args)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return module_plan(*args, **kwargs)

    module_plan = module.plan_layer
    monkeypatch.setattr(module, "plan_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harmonize_model(old, new, safety, task, progress=False)
    assert_unchanged(new, before)


def test_a_module_that_no_batch_reached_is_named():
    old, new, safety, task = setting(tiny_models.llama)
    name = "model.layers.2.mlp.gate_proj"
    with pytest.raises(ValueError, match=rf"{name}: its Gram in task .* no batch reached this module"):
        harmonize_model(old, new, safety, {**task, name: Gram(32)}, progress=False)


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


def test_names_must_match_whole():
    old, new, safety, task = setting(tiny_models.llama)
    with pytest.raises(ValueError, match=r"matches 'q_proj' with its whole name; .*put"):
        harmonize_model(old, new, safety, task, modules="q_proj", progress=False)


def test_other_adapters_than_lora_are_refused_by_name():
    from peft import IA3Config, get_peft_model

    old = tiny_models.llama()
    adapted = get_peft_model(copy.deepcopy(old), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    with pytest.raises(TypeError, match=r"k_proj: expected plain layers or LoRA"):
        harmonize_model(old, adapted, grams, grams, progress=False)


def test_an_encoder_decoder_is_refused_unless_modules_are_named():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        calibrate(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], progress=False)


def test_report_becomes_json():
    import json

    old, new, safety, task = setting(tiny_models.llama)
    new.model.layers[0].mlp.up_proj.weight.data.zero_()
    old.model.layers[0].mlp.up_proj.weight.data.zero_()
    report = harmonize_model(old, new, safety, task, progress=False)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(values) == {"config", "layers", "shared", "not_covered", "warnings"}
    layer = values["layers"]["model.layers.0.mlp.up_proj"]
    assert layer["columns"] == 32 and layer["old_norm"] == 0
    line = next(text for text in str(report).splitlines() if text.startswith("model.layers.0.mlp.up_proj "))
    assert line.endswith(" -")


def test_models_that_do_not_differ_are_remarked_on():
    old, new, safety, task = setting(tiny_models.llama)
    text = "no weight differs between model_old and model_new"
    assert text in str(harmonize_model(old, copy.deepcopy(old), safety, task, progress=False))
    assert text not in str(harmonize_model(old, new, safety, task, progress=False))
