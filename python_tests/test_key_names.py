"""Tensor names of every generation must find their place in today's transformers class, or be refused by name."""

from __future__ import annotations

import json

import adapter_models
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from hpa_ext.checkpoints import CheckpointError
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.models.key_names import KeyNames, map_names
from hpa_ext.models.linears import find_linears
from hpa_ext.models.skeleton import skeleton
from hpa_ext.models.structure import layer_depth

MODELS = {
    "llama": tiny_models.llama,
    "llama tied": lambda: tiny_models.llama(tie=True),
    "gpt2": tiny_models.gpt2,
    "llava": tiny_models.llava,
    "llava_next": adapter_models.llava_next,
    "qwen2": adapter_models.qwen2,
    "qwen2 tied": lambda: adapter_models.qwen2(tie=True),
    "qwen2_vl": adapter_models.qwen2_vl,
}
GENERATIONS = {
    "legacy": adapter_models.to_legacy,
    "transition": adapter_models.to_transition,
    "in memory": adapter_models.to_canonical,
}


def assert_holds(directory, model):
    """Every tensor of the model under its canonical name, bit-identical."""
    weights = CheckpointWeights(directory)
    for name, value in model.state_dict().items():
        assert torch.equal(weights.tensor(name), value), name
    return weights


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    model = tiny_models.llava()
    return model, adapter_models.save(model, tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def llava_skeleton(llava):
    return skeleton(llava[1])


@pytest.mark.parametrize("kind", MODELS)
def test_what_transformers_saves_is_found(kind, tmp_path):
    model = MODELS[kind]()
    adapter_models.save(model, tmp_path)
    weights = assert_holds(tmp_path, model)
    assert type(weights.model) is type(model)
    assert all(parameter.device.type == "meta" for parameter in weights.model.parameters())
    assert weights.missing == () and weights.ignored == () and weights.converted == {}
    assert set(weights.canonical_name) == set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations_of_llava(generation, llava, tmp_path):
    model, base = llava
    names = set(load_file(base / "model.safetensors"))
    renamed = {GENERATIONS[generation](name) for name in names}
    assert len(renamed) == len(names)
    weights = assert_holds(adapter_models.rewrite(base, tmp_path, GENERATIONS[generation]), model)
    assert set(weights.canonical_name) == renamed
    # And transformers, which is the authority, finds the same tensors in the files.
    reloaded = adapter_models.load(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("vision", ["with its vision tower", "without"])
def test_original_llava_layout(vision, llava, tmp_path):
    model, base = llava
    config = adapter_models.original_config(model, tmp_path / "tower")
    keep = vision == "with its vision tower"

    def rename(name):
        return None if "vision_tower" in name and not keep else adapter_models.to_original(name)

    original = adapter_models.rewrite(base, tmp_path / "original", rename, config)
    if keep:
        weights = assert_holds(original, model)
        assert weights.missing == ()
    else:
        weights = CheckpointWeights(original)
        assert weights.missing and all(name.startswith("model.vision_tower.") for name in weights.missing)
        with pytest.raises(CheckpointError, match=r"vision_tower.*not in the files"):
            weights.tensor(weights.missing[0])
    assert type(weights.model).__name__ == "LlavaForConditionalGeneration"
    assert weights.disk_name["model.language_model.layers.0.self_attn.q_proj.weight"] == (
        "model.layers.0.self_attn.q_proj.weight"
    )
    assert weights.disk_name["model.multi_modal_projector.linear_2.bias"] == "model.mm_projector.2.bias"
    linears = find_linears(weights.model)
    assert set(linears) == set(find_linears(model))
    assert layer_depth(weights.model, "model.language_model.layers.2.mlp.up_proj") == 1.0


def test_original_llava_1_6_is_llava_next(tmp_path):
    model = adapter_models.llava_next()
    adapter_models.save(model, tmp_path / "base")
    config = adapter_models.original_config(model, tmp_path / "tower")
    config |= {
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[32, 64]],
        "image_aspect_ratio": "anyres",
    }
    original = adapter_models.rewrite(tmp_path / "base", tmp_path / "o", adapter_models.to_original, config)
    weights = assert_holds(original, model)
    assert type(weights.model).__name__ == "LlavaNextForConditionalGeneration"
    assert "model.image_newline" in weights.canonical_name


def test_vision_tower_known_by_its_name(llava, tmp_path):
    config = adapter_models.original_config(llava[0], tmp_path / "tower")
    config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (tmp_path / "config.json").write_text(json.dumps(config))
    vision = skeleton(tmp_path).config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "mm_vision_tower 'google/siglip-so400m' is neither"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ],
)
def test_original_llava_that_transformers_lacks(change, message, llava, tmp_path):
    config = adapter_models.original_config(llava[0], tmp_path / "tower") | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        skeleton(tmp_path)


def test_base_model_prefix_added_and_removed(tmp_path):
    for make, prefix in ((tiny_models.llama, "model."), (tiny_models.gpt2, "transformer.")):
        model = make()
        base = adapter_models.save(model, tmp_path / prefix / "base")
        bare = adapter_models.rewrite(base, tmp_path / prefix / "bare", lambda name, p=prefix: name.removeprefix(p))
        assert_holds(bare, model)
        doubled = adapter_models.rewrite(base, tmp_path / prefix / "more", lambda name, p=prefix: f"{p}{name}")
        assert_holds(doubled, model)
        wrong = adapter_models.rewrite(base, tmp_path / prefix / "wrong", lambda name: f"wrapper.{name}")
        with pytest.raises(CheckpointError, match="fit nowhere"):
            CheckpointWeights(wrong)


def test_computed_buffers_are_ignored(llava, tmp_path):
    target = adapter_models.rewrite(llava[1], tmp_path, adapter_models.to_legacy)
    tensors = load_file(target / "model.safetensors")
    extra = [
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
    ]
    save_file(
        {**tensors, **{name: torch.zeros(4) for name in extra}}, target / "model.safetensors", metadata={"format": "pt"}
    )
    assert sorted(CheckpointWeights(target).ignored) == sorted(extra)


def test_unknown_tensor_names_what_was_tried(llava_skeleton):
    names = ["language_model.model.norm.weight", "language_model.model.layers.0.mlp.gate_projection.weight"]
    with pytest.raises(ValueError, match="1 of 2 tensors fit nowhere in LlavaForConditionalGeneration") as error:
        map_names(names, llava_skeleton)
    assert "tried model.language_model.layers.0.mlp.gate_projection.weight" in str(error.value)


def test_two_tensors_in_one_place(llava_skeleton):
    names = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    with pytest.raises(ValueError, match=r"both belong to 'model.language_model.norm.weight'"):
        map_names(names, llava_skeleton)


def test_own_rules_suffice_for_llava_where_transformers_has_none(llava, llava_skeleton, monkeypatch):
    names = KeyNames(llava_skeleton)
    monkeypatch.setattr(names._transformers, "_renamings", [])
    monkeypatch.setattr(names._transformers, "_converters", [])
    held = {adapter_models.to_canonical(name): name for name in llava[0].state_dict()}
    for disk in load_file(llava[1] / "model.safetensors"):
        for form in (disk, *(rename(disk) for rename in (*GENERATIONS.values(), adapter_models.to_original))):
            assert names.canonical(form) == held[adapter_models.to_canonical(disk)]


def test_tied_weights_have_one_name_on_disk(tmp_path):
    adapter_models.save(tiny_models.llama(tie=True), tmp_path)
    weights = CheckpointWeights(tmp_path)
    assert weights.disk_name["lm_head.weight"] == weights.disk_name["model.embed_tokens.weight"]
    assert "lm_head.weight" not in weights.canonical_name
    assert torch.equal(weights.tensor("lm_head.weight"), weights.tensor("model.embed_tokens.weight"))


def test_experts_that_transformers_stacks(tmp_path):
    model = adapter_models.mixtral()
    adapter_models.save(model, tmp_path)
    weights = CheckpointWeights(tmp_path)
    stacked = "model.layers.0.mlp.experts.down_proj"
    assert stacked in model.state_dict() and stacked in set(weights.converted.values())
    assert weights.missing == ()
    attention = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(weights.tensor(attention), model.state_dict()[attention])
    with pytest.raises(CheckpointError, match=r"experts.down_proj is stored as 3 tensors"):
        weights.tensor(stacked)


def test_missing_decoder_weight(llava, tmp_path):
    lost = "model.language_model.layers.1.mlp.up_proj.weight"
    target = adapter_models.rewrite(
        llava[1], tmp_path, lambda name: None if adapter_models.to_canonical(name) == lost else name
    )
    with pytest.raises(CheckpointError, match=f"lacks 1 parameters.*{lost}"):
        CheckpointWeights(target)


def test_shapes_other_than_the_configuration_says(llava, tmp_path):
    config = json.loads((llava[1] / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 56
    target = adapter_models.rewrite(llava[1], tmp_path, lambda name: name, config)
    with pytest.raises(CheckpointError, match=r"_proj.weight has the shape .*48.*expected .*56"):
        CheckpointWeights(target)


def test_quantised_checkpoint_is_refused(llava, tmp_path):
    config = json.loads((llava[1] / "config.json").read_text())
    target = adapter_models.rewrite(
        llava[1], tmp_path, lambda name: name, config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    )
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\)"):
        CheckpointWeights(target)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, FileNotFoundError, "config.json: no such file"),
        ("{", ValueError, "not JSON"),
        ("[]", ValueError, "expected a JSON object"),
        ("{}", ValueError, "'architectures'"),
        (
            '{"architectures": ["MyModel"], "auto_map": {"AutoModel": "my.MyModel"}}',
            ValueError,
            "no model class 'MyModel'",
        ),
        ('{"architectures": ["AutoModelForCausalLM"]}', ValueError, "no model class"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}', ValueError, "LlamaForCausalLM"),
    ],
)
def test_configurations_that_give_no_model(content, kind, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(kind, match=message):
        skeleton(tmp_path)


def test_code_beside_a_checkpoint_is_not_run(tmp_path):
    model = tiny_models.llama()
    adapter_models.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    assert type(skeleton(tmp_path)).__module__.startswith("transformers.")
