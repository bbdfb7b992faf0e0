"""Adapters that cannot be read exactly must be refused, with the option, file or tensor in the message."""

from __future__ import annotations

import json
import shutil

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import LANGUAGE
from safetensors.torch import load_file, save_file

from hpa_ext.checkpoints import CheckpointError
from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.models.skeleton import skeleton

KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
OLD_KEY = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
PATCHES = "base_model.model.model.vision_tower.embeddings.patch_embedding"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    base = adapter_models.save(tiny_models.llava(), directory / "base")
    adapter_models.adapter(adapter_models.load(base), directory / "adapter", target_modules=LANGUAGE)
    return base, directory / "adapter", skeleton(base)


@pytest.fixture
def adapter(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made[1], tmp_path / "adapter")


def set_option(adapter, **options):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def set_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'.*changed the base"),
        ({"init_lora_weights": "olora"}, "'olora'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"init_lora_weights": "mica"}, "'mica', which is not understood"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication.*more layers"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"option_of_the_future": 3}, "option_of_the_future is 3, which is refused"),
        ({"r": 0}, "r: expected a positive number, got 0"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a positive number"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.*positive"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern.*regular expression"),
        ({"rank_pattern": {"q_proj": 3}}, r"lora_A.weight has the shape \[4, 32\]; expected \[3, 32\].*rank 3"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(options, message, made, adapter):
    set_option(adapter, **options)
    with pytest.raises(CheckpointError, match=message):
        LoraAdapter(adapter, made[2])


def test_options_that_change_nothing_are_let_through(made, adapter):
    set_option(adapter, lora_dropout=0.3, loftq_config={}, megatron_core="megatron.core", option_of_the_future=None)
    assert len(LoraAdapter(adapter, made[2]).updates) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "q_proj: has lora_A without the other half"),
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), "q_proj: has lora_B without the other half"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 31)}), r"\[4, 31\]; expected \[4, 32\]"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.zeros(33, 4)}), r"\[33, 4\]; expected \[32, 4\]"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}), "floating-point"),
        (lambda t: t.update({f"{KEY}.lora_B.bias": torch.zeros(32)}), "lora_bias.*has no bias"),
        (lambda t: t.update({f"{KEY}.lora_C.weight": torch.zeros(4)}), "1 of 19 tensors belong to nothing"),
        (
            lambda t: t.update({f"{KEY.replace('language_model', 'audio')}.lora_A.weight": torch.zeros(4)}),
            r"tried model\.audio\.layers",
        ),
        (
            lambda t: t.update({f"{OLD_KEY}.lora_A.weight": torch.zeros(4, 32)}),
            "and so does another tensor",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(104, 32)}), "resized embedding"),
        (
            lambda t: t.update({f"{PATCHES}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}),
            "patch_embedding, a Conv2d",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_tensors(change, message, made, adapter):
    set_tensors(adapter, change)
    with pytest.raises(CheckpointError, match=message):
        LoraAdapter(adapter, made[2])


def test_an_adapter_of_another_model_prints_what_was_tried(made, tmp_path):
    other = adapter_models.adapter(tiny_models.gpt2(), tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match="4 of 4 tensors belong to nothing in LlavaForConditional") as error:
        CheckpointWeights(made[0], adapters=[other])
    assert "transformer.h.0.attn.c_attn.lora_A.weight -> tried" in str(error.value)
    assert "model.language_model.layers.0" in str(error.value)


def test_pickles(made, adapter):
    (adapter / "non_lora_trainables.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"non_lora_trainables.bin: holds trained weights as a pickle.*save_file"):
        LoraAdapter(adapter, made[2])
    (adapter / "non_lora_trainables.bin").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin, a pickle, which is not read"):
        LoraAdapter(adapter, made[2])


def test_absent_and_cut_short(made, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors"):
        LoraAdapter(adapter, made[2])
    weights.unlink()
    with pytest.raises(OSError, match=r"adapter_model.safetensors"):
        LoraAdapter(adapter, made[2])
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file"):
        LoraAdapter(adapter / "nowhere", made[2])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_one_of_two_tied_weights(options, tmp_path):
    base = adapter_models.save(tiny_models.llama(tie=True), tmp_path / "base")
    adapter = adapter_models.adapter(adapter_models.load(base), tmp_path / "a", **options)
    with pytest.raises(CheckpointError, match=r"ties to .* as one tensor 'model.embed_tokens.weight'; untie"):
        CheckpointWeights(base, adapters=[adapter])


def test_both_tied_weights_replaced_alike(tmp_path):
    base = adapter_models.save(tiny_models.llama(tie=True), tmp_path / "base")
    adapter = adapter_models.adapter(
        adapter_models.load(base),
        tmp_path / "a",
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
    )
    names = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"tunes .* and .*, which the checkpoint ties to each other"):
        CheckpointWeights(base, adapters=[adapter])
    set_tensors(adapter, lambda tensors: tensors.update({names[0]: tensors[names[1]].clone()}))
    weights = CheckpointWeights(base, adapters=[adapter])
    assert torch.equal(weights.tensor("lm_head.weight"), weights.adapters[0].replaced["lm_head.weight"])


def test_arguments(made):
    with pytest.raises(TypeError, match="adapters: expected a sequence of directories"):
        CheckpointWeights(made[0], adapters=str(made[1]))
    with pytest.raises(CheckpointError, match="has no such tensor"):
        CheckpointWeights(made[0]).tensor("model.norm.weight")
