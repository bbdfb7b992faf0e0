"""A checkpoint with adapters, read without PEFT, must be what transformers and PEFT merge."""

from __future__ import annotations

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import LANGUAGE
from safetensors.torch import load_file, save_file

from hpa_ext.checkpoints.lora_update import LoraUpdate, Step, apply_steps
from hpa_ext.checkpoints.weights import CheckpointWeights

PATTERNS = {
    "rank_pattern": {r"layers.1.self_attn.q_proj": 2, "down_proj": 7, "c_attn": 3},
    "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 5, "v_proj": 11, "h.1.attn.c_attn": 5},
}
LLAMA, GPT2, QWEN2 = tiny_models.llama, tiny_models.gpt2, adapter_models.qwen2
LLAVA, LLAVA_NEXT, QWEN2_VL = tiny_models.llava, adapter_models.llava_next, adapter_models.qwen2_vl

CASES = {
    "plain": (LLAVA, {"target_modules": LANGUAGE}),
    "rsLoRA": (LLAVA, {"target_modules": LANGUAGE, "use_rslora": True}),
    "patterns": (LLAVA, {"target_modules": LANGUAGE, **PATTERNS}),
    "patterns with rsLoRA": (LLAMA, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, **PATTERNS}),
    "DoRA": (LLAVA, {"target_modules": LANGUAGE, "use_dora": True}),
    "all-linear": (LLAVA, {"target_modules": "all-linear"}),
    "names that hit the vision tower": (LLAVA, {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "all biases": (LLAVA, {"target_modules": LANGUAGE, "bias": "all"}),
    "projector trained in full": (LLAVA, {"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]}),
    "head and embedding": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "bias of B": (QWEN2, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "bias of B and all biases": (QWEN2, {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "dropout": (LLAMA, {"target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": "gaussian"}),
    "Conv1D": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **PATTERNS}),
    "Conv1D with DoRA": (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "Conv1D with bias of B": (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "LLaVA-NeXT": (LLAVA_NEXT, {"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]}),
    "Qwen2-VL": (QWEN2_VL, {"target_modules": ["q_proj", "v_proj", "qkv"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directory of a saved model by its maker and dtype."""
    made = {}

    def base(make, dtype):
        if (make, dtype) not in made:
            made[make, dtype] = adapter_models.save(make(), tmp_path_factory.mktemp("base") / "model", dtype)
        return made[make, dtype]

    return base


def check(base, *adapters):
    """Compare with PEFT; the names of the tensors that the adapters changed."""
    expected = adapter_models.merged_by_peft(base, *adapters)
    weights = CheckpointWeights(base, adapters=adapters)
    changed = set()
    for name, value in expected.items():
        adapter_models.assert_equal_to_rounding(weights.tensor(name), value, name)
        differs = not torch.equal(value, weights.base_tensor(name))
        assert differs == weights.is_changed(name), name
        changed |= {name} if differs else set()
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_what_peft_merges(case, dtype, bases, tmp_path):
    make, options = CASES[case]
    base = bases(make, dtype)
    adapter = adapter_models.adapter(adapter_models.load(base), tmp_path / "adapter", **options)
    changed = check(base, adapter)
    updates = CheckpointWeights(base, adapters=[adapter]).adapters[0].updates
    assert {f"{name}.weight" for name in updates} <= changed
    assert any("vision_tower" in name for name in changed) == (case in ("all-linear", "all biases") or "hit" in case)


def test_fp16(bases, tmp_path):
    base = bases(LLAMA, torch.float16)
    check(base, adapter_models.adapter(adapter_models.load(base), tmp_path / "a", target_modules=["q_proj", "up_proj"]))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_embedding_and_head(dtype, use_dora, bases, tmp_path):
    base = bases(LLAMA, dtype)
    targets = ["q_proj", "embed_tokens", *([] if use_dora else ["lm_head"])]
    adapter = adapter_models.adapter(
        adapter_models.load(base), tmp_path / "a", target_modules=targets, use_dora=use_dora
    )
    weights = CheckpointWeights(base, adapters=[adapter])
    expected = adapter_models.merged_by_peft(base, adapter)
    name = "model.embed_tokens.weight"
    ours, theirs, before = weights.tensor(name), expected[name], weights.base_tensor(name)
    assert not torch.equal(ours, before)
    if dtype == torch.float32 or use_dora:
        adapter_models.assert_equal_to_rounding(ours, theirs)
    else:
        # PEFT rounds the update of an embedding before adding it: two roundings, ours is one.
        update = weights.adapters[0].updates["model.embed_tokens"]
        exact = before.double() + update.delta(torch.float64).mT
        errors = [(value.double() - exact).abs() for value in (ours, theirs)]
        assert (errors[0] <= 2**-8 * exact.abs() * 1.001).all()
        assert errors[0].mean() < errors[1].mean()
    if not use_dora:
        adapter_models.assert_equal_to_rounding(weights.tensor("lm_head.weight"), expected["lm_head.weight"])


def test_several_adapters_in_order(bases, tmp_path):
    base = bases(LLAVA, torch.float32)
    first = adapter_models.adapter(adapter_models.load(base), tmp_path / "1", target_modules=LANGUAGE, bias="all")
    step = {"target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"], "use_dora": True}
    second = adapter_models.adapter(adapter_models.load(base), tmp_path / "2", seed=8, **step)
    check(base, first, second)
    orders = [CheckpointWeights(base, adapters=order) for order in ([first, second], [second, first])]
    bias = "model.multi_modal_projector.linear_1.bias"
    assert not torch.equal(*(weights.tensor(bias) for weights in orders))


def test_embedding_saved_with_its_lora_does_not_undo_the_step_before(bases, tmp_path):
    base = bases(LLAMA, torch.float32)
    make = {"target_modules": ["embed_tokens"]}
    paths = [adapter_models.adapter(adapter_models.load(base), tmp_path / str(i), seed=i, **make) for i in (1, 2)]
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(paths[1] / "adapter_model.safetensors")
    weights = CheckpointWeights(base, adapters=paths)
    deltas = [adapter.updates["model.embed_tokens"].delta().mT for adapter in weights.adapters]
    name = "model.embed_tokens.weight"
    assert torch.allclose(weights.tensor(name), weights.base_tensor(name) + sum(deltas), atol=1e-6)


GENERATIONS = {
    "legacy": adapter_models.to_legacy,
    "transition": adapter_models.to_transition,
    "original": adapter_models.to_original,
}


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [("original", "original"), ("legacy", "original"), ("original", "legacy"), ("transition", "legacy")],
)
def test_names_of_base_and_adapter_may_be_of_different_generations(of_base, of_adapter, bases, tmp_path):
    base = bases(LLAVA, torch.float32)
    adapter = adapter_models.adapter(
        adapter_models.load(base), tmp_path / "a", target_modules="all-linear",
        modules_to_save=["multi_modal_projector"], rank_pattern={"self_attn.q_proj": 2},
    )  # fmt: skip
    prefix = "base_model.model."
    config = (
        adapter_models.original_config(adapter_models.load(base), tmp_path / "t") if of_base == "original" else None
    )
    old_base = adapter_models.rewrite(base, tmp_path / "base", GENERATIONS[of_base], config)
    old = adapter_models.rewrite(
        adapter, tmp_path / "old", lambda name: prefix + GENERATIONS[of_adapter](name.removeprefix(prefix))
    )
    assert set(load_file(old / "adapter_model.safetensors")) != set(load_file(adapter / "adapter_model.safetensors"))
    weights = CheckpointWeights(old_base, adapters=[old])
    for name, value in adapter_models.merged_by_peft(base, adapter).items():
        adapter_models.assert_equal_to_rounding(weights.tensor(name), value, name)


def test_pattern_in_the_names_that_the_model_had_when_it_was_trained(bases, tmp_path):
    base = bases(LLAVA, torch.float32)
    adapter = adapter_models.adapter(adapter_models.load(base), tmp_path / "a", target_modules=LANGUAGE)
    prefix = "base_model.model."
    old = adapter_models.rewrite(
        adapter, tmp_path / "old", lambda name: prefix + adapter_models.to_legacy(name.removeprefix(prefix))
    )
    text = (old / "adapter_config.json").read_text()
    pattern = '"alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 32}'
    (old / "adapter_config.json").write_text(text.replace('"alpha_pattern": {}', pattern))
    (found,) = CheckpointWeights(base, adapters=[old]).adapters
    assert found.updates["model.language_model.layers.0.self_attn.q_proj"].scaling == 8
    assert found.updates["model.language_model.layers.1.self_attn.q_proj"].scaling == 2


def test_projector_beside_an_original_llava_adapter(bases, tmp_path):
    base = bases(LLAVA, torch.float32)
    adapter = adapter_models.adapter(adapter_models.load(base), tmp_path / "a", target_modules=LANGUAGE)
    trained = {"base_model.model.model.mm_projector.2.weight": torch.randn(32, 32)}
    save_file(trained, adapter / "non_lora_trainables.safetensors")
    weights = CheckpointWeights(base, adapters=[adapter])
    name = "model.multi_modal_projector.linear_2.weight"
    assert weights.is_changed(name) and torch.equal(weights.tensor(name), *trained.values())


def test_reads_only_what_is_asked_for(bases, tmp_path, monkeypatch):
    base = bases(LLAVA, torch.float32)
    adapter = adapter_models.adapter(adapter_models.load(base), tmp_path / "a", target_modules=LANGUAGE)
    from hpa_ext.checkpoints.reader import CheckpointReader

    read, original = [], CheckpointReader.read
    monkeypatch.setattr(
        CheckpointReader, "read", lambda self, name, *rest: (read.append(name), original(self, name, *rest))[1]
    )
    weights = CheckpointWeights(base, adapters=[adapter])
    assert read == []
    weights.tensor("model.language_model.layers.0.self_attn.q_proj.weight")
    assert sorted(read) == [
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_steps_in_pieces_equal_float64(transposed, magnitude, monkeypatch):
    from hpa_ext.checkpoints import lora_update

    torch.manual_seed(0)
    steps = [
        Step(torch.rand(40), LoraUpdate(torch.randn(3, 40), torch.randn(70, 3), 0.5, transposed=transposed)),
        Step(torch.rand(40), None),
        Step(
            None,
            LoraUpdate(
                torch.randn(2, 40), torch.randn(70, 2), 2.0, torch.rand(70) + 0.5 if magnitude else None,
                transposed=transposed,
            ),
        ),
    ]  # fmt: skip
    weight = torch.randn(70, 40)
    exact = weight.double()
    for step in steps:
        exact = exact if step.gain is None else exact * step.gain.double()
        if step.update is not None:
            exact = exact + step.update.scaling * step.update.b.double() @ step.update.a.double()
            if step.update.magnitude is not None:
                exact = step.update.magnitude.double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
    stored = weight.mT.contiguous() if transposed else weight
    before = stored.clone()
    whole = apply_steps(stored, steps, transposed=transposed)
    monkeypatch.setattr(lora_update, "_ELEMENTS_AT_A_TIME", 7 * 40)
    pieces = apply_steps(stored, steps, transposed=transposed)
    for result in (whole, pieces):
        assert torch.allclose((result.mT if transposed else result).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(stored, before)
    assert apply_steps(stored, []) is stored
