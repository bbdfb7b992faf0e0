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
    assert f"warning: safety Gram needed more damping in 1 layers, such as {name}" in str(report)


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
        "no tokens": (old, new, empty, task, {}, ValueError, rf"{name}: gram.safety: .*no tokens"),
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
