"""harmonize_model on transformers models; nothing is written when anything is refused."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from hpa_ext import Gram, HPAConfig, NumericalError, calibrate, harmonize, harmonize_model

MAKERS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "llava": tiny_models.llava}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_is_harmonized_at_its_depth(kind):
    old, new, safety, task = tiny_models.setting(MAKERS[kind])
    before_old, before = tiny_models.snapshot(old), tiny_models.snapshot(new)
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
    tiny_models.assert_unchanged(old, before_old)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report) and all(
        name in text for name, text in zip(report.layers, lines[2:], strict=True)
    )
    assert report.to_dict()["config"]["retain_max"] == 15.0


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
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    config = HPAConfig(retain_min=0.0, retain_max=0.0, orthogonal=False)
    before = tiny_models.snapshot(new)
    harmonize_model(old, new, safety, task, config, progress=False)
    tiny_models.assert_unchanged(new, before)  # nothing retained and nothing adjusted is sequential fine-tuning


def test_rescues_are_reported():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
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
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
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
        "config": (old, new, safety, task, {"config": 3}, TypeError, "config: expected an HPAConfig or a Comp"),
        "modules": (old, new, safety, task, {"modules": "no"}, ValueError, "modules: no linear layer"),
    }


@pytest.mark.parametrize("case", bad_calls().keys())
def test_bad_input_leaves_the_model_unchanged(case):
    old, new, safety, task, options, error, message = bad_calls()[case]
    before = tiny_models.snapshot(new)
    with pytest.raises(error, match=message):
        harmonize_model(old, new, safety, task, progress=False, **options)
    if case != "meta":
        tiny_models.assert_unchanged(new, before)


def test_an_expanded_weight_is_refused_before_anything_is_written():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    linear = new.model.layers[2].mlp.down_proj
    linear.weight = nn.Parameter(torch.randn(1, 48).expand(32, 48), requires_grad=False)
    before = tiny_models.snapshot(new)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj: its weight is an expanded view"):
        harmonize_model(old, new, safety, task, progress=False)
    tiny_models.assert_unchanged(new, before)


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
    arguments = list(tiny_models.setting(tiny_models.llama))
    arguments[position] = value
    with pytest.raises(TypeError, match=message):
        harmonize_model(*arguments, progress=False)


def test_a_quantised_old_model_is_refused():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    name = "model.layers.1.mlp.up_proj"
    old.get_submodule(name).weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=rf"{name}: expected a floating-point weight.*quantised"):
        harmonize_model(old, new, safety, task, progress=False)


def test_interrupt_waits_until_the_model_is_whole(monkeypatch):
    import os
    import signal

    import hpa_ext.hpa.model as module

    monkeypatch.setattr(module, "BATCH_BYTES", 1)  # every layer alone
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    expected = copy.deepcopy(new)
    harmonize_model(old, expected, safety, task, progress=False)
    merge, merged = module.merge_updates, []

    def interrupted(*args, **kwargs):
        merged.append(merge(*args, **kwargs))
        if len(merged) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "merge_updates", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        harmonize_model(old, new, safety, task, progress=False)
    assert len(merged) == len(safety) and signal.getsignal(signal.SIGINT) is handler
    tiny_models.assert_unchanged(new, tiny_models.snapshot(expected))


def test_interrupt_while_scoring_changes_nothing(monkeypatch):
    import hpa_ext.hpa.model as module

    monkeypatch.setattr(module, "BATCH_BYTES", 1)  # every layer alone
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    before, scored = tiny_models.snapshot(new), []

    def interrupted(*args, **kwargs):
        scored.append(args)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return module_measure(*args, **kwargs)

    module_measure = module.measure
    monkeypatch.setattr(module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harmonize_model(old, new, safety, task, progress=False)
    tiny_models.assert_unchanged(new, before)


def test_a_module_that_no_batch_reached_is_named():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    name = "model.layers.2.mlp.gate_proj"
    with pytest.raises(ValueError, match=rf"{name}: its Gram in task .* no batch reached this module"):
        harmonize_model(old, new, safety, {**task, name: Gram(32)}, progress=False)


def test_names_must_match_whole():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    with pytest.raises(ValueError, match=r"matches 'q_proj' with its whole name; .*put"):
        harmonize_model(old, new, safety, task, modules="q_proj", progress=False)


def test_an_encoder_decoder_is_refused_unless_modules_are_named():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        calibrate(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], progress=False)


def test_report_becomes_json():
    import json

    old, new, safety, task = tiny_models.setting(tiny_models.llama)
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
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    text = "no weight differs between the old and the new model"
    assert text in str(harmonize_model(old, copy.deepcopy(old), safety, task, progress=False))
    assert text not in str(harmonize_model(old, new, safety, task, progress=False))


PARTS = {
    "overlapping rows": lambda t: (t[:24, :16], t[12:36, :16]),
    "columns": lambda t: (t[:24, :16], t[:24, 16:]),
    "columns of a transposed tensor": lambda t: (t.mT[:16, :24].mT, t.mT[:16, 24:48].mT),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("batch_bytes", [1, 1 << 30])
def test_weights_that_are_parts_of_one_tensor(monkeypatch, kind, batch_bytes):
    """Whether they go through together or not: refused before the first is written if they share an element."""
    import hpa_ext.hpa.model as module

    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    torch.manual_seed(0)
    new = torch.nn.ModuleDict({name: torch.nn.Linear(16, 24, bias=False) for name in "abc"})
    old, apart = copy.deepcopy(new), copy.deepcopy(new)
    for name, part in zip("ab", PARTS[kind](torch.randn(64, 32)), strict=True):
        new[name].weight.data = part
        apart[name].weight.data = part.clone()
    grams = {name: torch.eye(16) for name in "abc"}
    before = [new[name].weight.clone() for name in "abc"]
    if kind == "overlapping rows":
        with pytest.raises(ValueError, match=r"^b: its weight overlaps that of a in model_new"):
            harmonize_model(old, new, grams, grams, progress=False)
        expected = before
    else:
        harmonize_model(old, new, grams, grams, progress=False)
        harmonize_model(old, apart, grams, grams, progress=False)
        expected = [apart[name].weight for name in "abc"]
        assert not any(torch.equal(*weights) for weights in zip(expected[:2], before[:2], strict=True))
    for name, weight in zip("abc", expected, strict=True):
        assert torch.equal(new[name].weight, weight)


@pytest.mark.parametrize("batch_bytes", [10000, 20000, 1 << 30])
@pytest.mark.parametrize("granularity", ["input", "output"])
def test_batches_change_no_bit(monkeypatch, granularity, batch_bytes):
    """Of layers that a LoRA has changed, of others that changed throughout, and of both."""
    import hpa_ext.hpa.model as module

    old = tiny_models.llama().bfloat16()
    alone = tiny_models.with_lora(old, ["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if "up_proj" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    grams = calibrate(old, tiny_models.batches(old), progress=False)
    together, sizes = copy.deepcopy(alone), []
    config = HPAConfig(granularity=granularity)
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    harmonize_model(old, alone, grams, grams, config, progress=False)
    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda updates, *a: sizes.append(len(updates)) or measure(updates, *a))
    harmonize_model(old, together, grams, grams, config, progress=False)
    assert max(sizes) > 1
    tiny_models.assert_unchanged(together, tiny_models.snapshot(alone))
