"""Several steps as one adapter."""

from __future__ import annotations

import json
import os
import shutil

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import LANGUAGE
from adapter_steps import KINDS, assert_same_weights, decisions, harmonized, make_steps, weights_of
from safetensors.torch import save_file

from hpa_ext.adapters import compose_adapters, load_adapter, merge_adapter
from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.harmonized_adapter import write_harmonized_adapter
from hpa_ext.models.skeleton import skeleton


@pytest.fixture(scope="module", params=KINDS)
def steps(request, tmp_path_factory):
    return make_steps(request.param, tmp_path_factory.mktemp("steps"))


def test_what_cannot_be_harmonized_or_composed(tmp_path):
    base = adapter_models.save(adapter_models.qwen2(), tmp_path / "base")
    model = skeleton(base)

    def make(name, **options):
        return adapter_models.adapter(adapter_models.load(base), tmp_path / name, **options)

    dora = make("dora", target_modules=["q_proj"], use_dora=True)
    plain = make("plain", target_modules=["q_proj"])
    full = make("full", target_modules=["k_proj"], modules_to_save=["q_proj"])
    bias = make("bias", target_modules=["q_proj"], lora_bias=True)
    step = harmonized(plain, model, tmp_path / "step", 0)
    target = tmp_path / "target"
    target.mkdir()
    for path, message in ((dora, "DoRA"), (step, "was harmonized already")):
        source = LoraAdapter(path, model)
        with pytest.raises(ValueError, match=message):
            write_harmonized_adapter(source, *decisions(source, 0), target)
    for paths, message in (
        ([plain, dora], "DoRA"), ([bias, plain], "lora_bias"), ([plain, full], "replaces .* composition is no LoRA"),
        ([], "one or more directories"), (plain, "one or more directories"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            compose_adapters(paths, tmp_path / "out", base=base)
    assert not os.path.lexists(tmp_path / "out") and not os.path.lexists(tmp_path / "out.partial")


def test_composing_finds_the_base_that_the_adapter_names(steps, tmp_path):
    base, paths = steps.base, steps.harmonized
    assert json.loads((paths[0] / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    compose_adapters(paths, tmp_path / "composed")
    nameless = shutil.copytree(paths[0], tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text()) | {"base_model_name_or_path": "meta/llama"}
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names 'meta/llama' as the base model"):
        compose_adapters([nameless, paths[1]], tmp_path / "other")


def test_composing_plain_adapters_gives_plain_lora(steps, tmp_path):
    base, plain = steps.base, steps.plain
    compose_adapters(plain, tmp_path / "composed", base=base)
    assert not (tmp_path / "composed" / "hpa_gain.safetensors").exists()
    assert_same_weights(adapter_models.merged_by_peft(base, tmp_path / "composed"), weights_of(base, plain))


def test_composing_keeps_what_else_was_trained(tmp_path):
    base = adapter_models.save(adapter_models.qwen2(), tmp_path / "base")
    model = skeleton(base)
    options = (
        {"bias": "all", "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "o_proj"]},
    )
    plain = [
        adapter_models.adapter(adapter_models.load(base), tmp_path / str(i), seed=i, **more)
        for i, more in enumerate(options)
    ]  # fmt: skip
    steps = [harmonized(path, model, tmp_path / f"step{i}", i) for i, path in enumerate(plain)]
    compose_adapters(steps, tmp_path / "composed", base=model)
    expected = weights_of(base, steps)
    assert_same_weights(weights_of(base, [tmp_path / "composed"]), expected)
    assert_same_weights(merge_adapter(load_adapter(adapter_models.load(base), steps)).state_dict(), expected)


def test_composing_keeps_the_projector_beside_an_original_llava_adapter(tmp_path):
    base = adapter_models.save(tiny_models.llava(), tmp_path / "base")
    paths = [
        adapter_models.adapter(adapter_models.load(base), tmp_path / str(i), seed=i, target_modules=LANGUAGE)
        for i in (1, 2)
    ]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        trained = {"base_model.model.model.mm_projector.0.weight": torch.randn(32, 32)}
        save_file(trained, path / "non_lora_trainables.safetensors")
    expected = weights_of(base, paths)
    assert torch.equal(expected["model.multi_modal_projector.linear_1.weight"], *trained.values())
    compose_adapters(paths, tmp_path / "composed", base=base)
    assert_same_weights(weights_of(base, [tmp_path / "composed"]), expected)
    assert_same_weights(merge_adapter(load_adapter(adapter_models.load(base), paths)).state_dict(), expected)
