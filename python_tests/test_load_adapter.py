"""Harmonized adapters inside PEFT's layers: the same outputs and the same merged weights as on disk."""

from __future__ import annotations

import copy
import json
import shutil

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import LANGUAGE
from adapter_steps import (
    KINDS,
    assert_same_outputs,
    assert_same_weights,
    first_batch,
    harmonized,
    make_steps,
    weights_of,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from hpa_ext.adapters import compose_adapters, load_adapter, merge_adapter
from hpa_ext.checkpoints import CheckpointError, verify_checkpoint
from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.models.skeleton import skeleton


@pytest.fixture(scope="module", params=KINDS)
def steps(request, tmp_path_factory):
    return make_steps(request.param, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("count", [1, 2])
def test_loaded_equals_merged_equals_composed_equals_disk(count, steps, tmp_path):
    base, paths = steps.base, steps.harmonized
    paths = paths[:count]
    on_disk = weights_of(base, paths)
    model = adapter_models.load(base)
    loaded = load_adapter(model, paths if count > 1 else paths[0])
    assert isinstance(loaded, PeftModel) and not loaded.training
    outputs = tiny_models.logits(loaded, first_batch(model))
    merged = merge_adapter(loaded)
    assert type(merged) is type(adapter_models.load(base))
    assert_same_weights(on_disk, merged.state_dict())
    assert_same_outputs(outputs, tiny_models.logits(merged, first_batch(merged)), merged.dtype)
    assert compose_adapters(paths, tmp_path / "composed", base=base) == tmp_path / "composed"
    assert_same_weights(weights_of(base, [tmp_path / "composed"]), on_disk)
    assert verify_checkpoint(tmp_path / "composed", progress=False).ok


def test_order_of_steps_matters(steps):
    base, paths = steps.base, steps.harmonized
    there, back = weights_of(base, paths), weights_of(base, paths[::-1])
    differing = [name for name in there if not torch.equal(there[name], back[name])]
    assert differing


def test_gain_is_not_what_plain_peft_does(steps):
    base, (step, _) = steps.base, steps.harmonized
    without = adapter_models.merged_by_peft(base, step)
    with_gain = weights_of(base, [step])
    for name in LoraAdapter(step, skeleton(base)).gain:
        assert not torch.equal(without[f"{name}.weight"], with_gain[f"{name}.weight"])


def test_an_adapter_that_peft_loads_as_nothing_is_refused(steps, monkeypatch):
    from peft import peft_model

    base, (step, _) = steps.base, steps.harmonized
    model = adapter_models.load(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = peft_model.load_peft_weights

    def renamed(*args, **kwargs):
        return {
            name.replace("layers.1", "layers.9").replace("h.1", "h.9"): v
            for name, v in original(*args, **kwargs).items()
        }

    monkeypatch.setattr(peft_model, "load_peft_weights", renamed)
    with pytest.raises(
        CheckpointError, match=r"after loading with PEFT, \S*\.1\.\S* does not hold the adapter's lora_"
    ):
        load_adapter(model, step)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plain_adapter_loads_as_with_peft(steps):
    base, (plain, _) = steps.base, steps.plain
    model = load_adapter(adapter_models.load(base), plain)
    theirs = PeftModel.from_pretrained(adapter_models.load(base), plain)
    batch = first_batch(theirs)
    assert torch.equal(tiny_models.logits(model, batch), tiny_models.logits(theirs, batch))
    assert "save_pretrained" not in vars(model)


def test_disabling_unmerging_unloading_and_deleting(steps):
    base, (step, _) = steps.base, steps.harmonized
    plain = adapter_models.load(base)
    model = load_adapter(adapter_models.load(base), step)
    batch = first_batch(plain)
    expected, tuned = tiny_models.logits(plain, batch), tiny_models.logits(model, batch)
    assert not torch.equal(expected, tuned)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, batch), expected)
    model.merge_adapter()
    assert_same_outputs(tiny_models.logits(model, batch), tuned, plain.dtype)
    model.unmerge_adapter()
    assert_same_outputs(tiny_models.logits(model, batch), tuned, plain.dtype)
    twin = copy.deepcopy(model)
    twin.delete_adapter("default")
    # PEFT itself trips over the name of a deleted adapter; the layers are what counts.
    assert_same_outputs(tiny_models.logits(twin.base_model.model, batch), expected, plain.dtype)
    assert_same_outputs(tiny_models.logits(model, batch), tuned, plain.dtype)
    unloaded = model.unload()
    assert_same_outputs(tiny_models.logits(unloaded, batch), expected, plain.dtype)
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


def test_saving_keeps_the_gain(steps, tmp_path):
    base, (step, _) = steps.base, steps.harmonized
    model = load_adapter(adapter_models.load(base), step, adapter_name="safe")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "safe").glob("*.safetensors")) == [
        "adapter_model.safetensors", "hpa_gain.safetensors"
    ]  # fmt: skip
    assert_same_weights(weights_of(base, [tmp_path / "safe"]), weights_of(base, [step]))
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_gain_survives_16_bits(steps):
    base, (step, _) = steps.base, steps.harmonized
    from hpa_ext.adapters.gain import gain_of as gain_in

    model = load_adapter(adapter_models.load(base), step)
    reference = LoraAdapter(step, skeleton(base)).gain
    model.to(torch.bfloat16)
    for name, gain in reference.items():
        assert torch.equal(gain_in(model.get_base_model().get_submodule(name), "default"), gain)


def test_the_next_step_trains_on_top(tmp_path):
    base = adapter_models.save(tiny_models.llama(), tmp_path / "base")
    tuned = adapter_models.adapter(adapter_models.load(base), tmp_path / "tuned", target_modules=["q_proj", "up_proj"])
    step = harmonized(tuned, skeleton(base), tmp_path / "step", 1)
    model = load_adapter(adapter_models.load(base), step)
    batch = first_batch(model)
    old = tiny_models.logits(model, batch)
    model.add_adapter("next", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "next"])
    assert_same_outputs(tiny_models.logits(model, batch), old, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".next." in name)
    model(**batch).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".next." in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.next" in name:
                parameter.normal_(std=0.1)
    outputs = tiny_models.logits(model, batch)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["next"])
    stacked = load_adapter(adapter_models.load(base), [step, tmp_path / "saved" / "next"])
    assert_same_outputs(tiny_models.logits(stacked, batch), outputs, torch.float32)
    merged = model.merge_and_unload(adapter_names=["default", "next"])
    assert_same_weights(merged.state_dict(), weights_of(base, [step, tmp_path / "saved" / "next"]))


def test_what_a_gain_excludes_is_refused(steps):
    base, (step, other) = steps.base, steps.harmonized
    model = load_adapter(adapter_models.load(base), step)
    batch = first_batch(model)
    with pytest.raises(TypeError, match="without adapters"):
        load_adapter(model, other)
    samples = len(batch["input_ids"])
    with pytest.raises(ValueError, match="adapter_names"):
        model(**{key: value for key, value in batch.items() if key != "labels"}, adapter_names=["__base__"] * samples)
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "mean")
    with pytest.raises(TypeError, match="expected what load_adapter returned"):
        merge_adapter(adapter_models.load(base))


def test_harmonizing_the_loaded_model_again_is_refused(steps):
    from hpa_ext import calibrate, harmonize_model

    base, (step, _) = steps.base, steps.harmonized
    old, model = adapter_models.load(base), load_adapter(adapter_models.load(base), step)
    grams = calibrate(old, [first_batch(old)], progress=False)
    with pytest.raises(ValueError, match="LoRA variant"):
        harmonize_model(old, model, grams, grams, progress=False)


@pytest.mark.parametrize("generation", ["legacy", "original"])
def test_adapter_with_older_names_onto_todays_model(generation, tmp_path):
    rename = {"legacy": adapter_models.to_legacy, "original": adapter_models.to_original}[generation]
    base = adapter_models.save(tiny_models.llava(), tmp_path / "base")
    adapter = adapter_models.adapter(
        adapter_models.load(base), tmp_path / "a", target_modules=LANGUAGE, rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 9}, use_rslora=True, modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    step = harmonized(adapter, skeleton(base), tmp_path / "step", 4)
    prefix = "base_model.model."
    old = adapter_models.rewrite(step, tmp_path / "old", lambda name: name)
    shutil.copy(step / "hpa_gain.safetensors", old)
    from safetensors.torch import save_file

    tensors = load_file(step / "adapter_model.safetensors")
    mark = LoraAdapter(step, skeleton(base)).metadata
    save_file(
        {prefix + rename(name.removeprefix(prefix)): value for name, value in tensors.items()},
        old / "adapter_model.safetensors", metadata=mark,
    )  # fmt: skip
    config = json.loads((old / "adapter_config.json").read_text())
    if generation == "original":
        config["modules_to_save"] = None
    (old / "adapter_config.json").write_text(json.dumps(config))
    if generation == "original":
        # The original has no modules_to_save: its projector lies beside the adapter.
        projector = {
            name: value for name, value in load_file(old / "adapter_model.safetensors").items() if "mm_" in name
        }
        others = {
            name: value for name, value in load_file(old / "adapter_model.safetensors").items() if "mm_" not in name
        }
        save_file(others, old / "adapter_model.safetensors", metadata=mark)
        save_file(projector, old / "non_lora_trainables.safetensors")
    expected = weights_of(base, [step])
    merged = merge_adapter(load_adapter(adapter_models.load(base), old)).state_dict()
    assert_same_weights(merged, expected)
