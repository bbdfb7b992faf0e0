"""harmonize_checkpoint must write what harmonize_model computes, whatever the form of the input."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from checkpoint_files import contents
from harmonize_inputs import DECODER, make_inputs
from helpers import assert_same_bits
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hpa_ext
from hpa_ext.adapters import load_adapter, merge_adapter
from hpa_ext.checkpoints import CheckpointError, CheckpointReader, verify_checkpoint
from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.hpa.checkpoint import harmonize_checkpoint, merge_checkpoint, plan_checkpoint

MODELS = {"llava": tiny_models.llava, "llama": tiny_models.llama, "gpt2": tiny_models.gpt2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def float_inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), dtype=torch.float32)


def run(inputs, out, new="new", **options):
    return harmonize_checkpoint(**inputs.arguments(new), out=out, progress=False, **options)


def weights(model, directory, dtype=None):
    return type(model).from_pretrained(directory, dtype=dtype or next(model.parameters()).dtype).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_equals_harmonize_model_bit_for_bit(tmp_path, kind, dtype):
    inputs = make_inputs(tmp_path, MODELS[kind], dtype)
    report = run(inputs, tmp_path / "out")
    old, new = inputs.models["old"], inputs.models["new"]
    expected = hpa_ext.harmonize_model(old, new, **inputs.grams, progress=False)
    found = weights(new, tmp_path / "out")
    for name, tensor in new.state_dict().items():
        assert_same_bits(found[name], tensor)
    assert report.to_dict() == expected.to_dict()
    verified = verify_checkpoint(tmp_path / "out", old=inputs.old, progress=False)
    assert verified.ok and verified.retained_columns > 0


@pytest.mark.parametrize(
    "options", [{"granularity": "output"}, {"importance": "product"}, {"orthogonal": False}, {"normalization": "sum"},
                {"damping": 0.1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("new", ["new", "adapter"])
def test_settings_reach_the_result(inputs, float_inputs, tmp_path, options, new):
    inputs = inputs if new == "new" else float_inputs
    config = hpa_ext.HPAConfig(**options)
    report = run(inputs, tmp_path / "out", new, config=config)
    assert report.config == config
    kind, dtype = type(inputs.models["old"]), inputs.models["old"].dtype
    model = kind.from_pretrained(inputs.new, dtype=dtype)
    if new == "adapter":
        model = PeftModel.from_pretrained(kind.from_pretrained(inputs.old, dtype=dtype), inputs.adapter)
    hpa_ext.harmonize_model(inputs.models["old"], model, **inputs.grams, config=config, progress=False)
    model = model.merge_and_unload() if new == "adapter" else model
    found, plain = (weights(inputs.models["old"], directory) for directory in (tmp_path / "out", inputs.new))
    # In memory an adapter is merged, and rounded, before it is scored; on disk everything is rounded once.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if new == "adapter" else {"rtol": 0, "atol": 0}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, **tolerance)
    assert any(not torch.equal(found[name], plain[name]) for name in found)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2, "c_fc": 2}}], ids=str)
def test_adapter_equals_its_merged_checkpoint(tmp_path, kind, options):
    """In float32, where merging first rounds to the same numbers: relative difference of 1e-6."""
    inputs = make_inputs(tmp_path, MODELS[kind], torch.float32, **options)
    merged = inputs.models["adapted"].merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    inputs.merged = tmp_path / "merged"
    streamed = run(inputs, tmp_path / "from-adapter", "adapter")
    whole = run(inputs, tmp_path / "from-merged", "merged", modules=list(streamed.layers))
    first, second = weights(merged, tmp_path / "from-adapter"), weights(merged, tmp_path / "from-merged")
    for name in first:
        assert float((first[name] - second[name]).norm()) <= 1e-6 * float(second[name].norm() + 1e-30), name
    for name, layer in streamed.layers.items():
        assert torch.equal(layer.retained, whole[name].retained)
        assert layer.projection_coefficient == pytest.approx(whole[name].projection_coefficient, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "lora_alpha": 7}], ids=str)
def test_adapter_output_merged_equals_checkpoint_output(tmp_path, dtype, lora):
    inputs = make_inputs(tmp_path, dtype=dtype, **lora)
    run(inputs, tmp_path / "checkpoint", "adapter")
    run(inputs, tmp_path / "step", "adapter", output="adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "step").iterdir())
    assert size < sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir()) / 3
    base = type(inputs.models["old"]).from_pretrained(inputs.old, dtype=dtype)
    merged = merge_adapter(load_adapter(base, tmp_path / "step")).state_dict()
    for name, tensor in weights(inputs.models["old"], tmp_path / "checkpoint").items():
        assert_same_bits(merged[name], tensor)  # both round once, from the same float32 sum
    assert verify_checkpoint(tmp_path / "step", progress=False).ok


def test_second_step_on_an_adapter_equals_one_on_the_checkpoint(tmp_path):
    """Old + its adapter is the old model of the next step, whether it was written out or not (float32: 1e-6)."""
    inputs = make_inputs(tmp_path, dtype=torch.float32)
    run(inputs, tmp_path / "checkpoint", "adapter")
    run(inputs, tmp_path / "step", "adapter", output="adapter")
    second = tiny_models.with_lora(tiny_models.llava(), DECODER, seed=9)
    second.save_pretrained(tmp_path / "second")
    grams = {"safety": inputs.safety, "task": inputs.task}
    options = {"new": tmp_path / "second", **grams, "progress": False}
    one = harmonize_checkpoint(tmp_path / "checkpoint", out=tmp_path / "one", **options)
    two = harmonize_checkpoint(inputs.old, out=tmp_path / "two", old_adapters=str(tmp_path / "step"), **options)
    assert list(one.layers) == list(two.layers)
    listed = plan_checkpoint(
        inputs.old, tmp_path / "second", **grams, out=tmp_path / "three", old_adapters=[tmp_path / "step"]
    )
    assert listed.modules == len(two)
    merge_checkpoint(tmp_path / "checkpoint", tmp_path / "second", tmp_path / "merged-one", progress=False)
    pair = [tmp_path / "step", tmp_path / "second"]
    merge_checkpoint(inputs.old, pair, tmp_path / "merged-two", progress=False)
    for names in (("one", "two"), ("merged-one", "merged-two")):
        first, other = (weights(inputs.models["old"], tmp_path / name) for name in names)
        for name in first:
            assert float((first[name] - other[name]).norm()) <= 1e-6 * float(first[name].norm() + 1e-30), name


def test_a_harmonized_adapter_as_new_counts_with_its_gain(tmp_path):
    inputs = make_inputs(tmp_path, dtype=torch.float32)
    run(inputs, tmp_path / "step", "adapter", output="adapter")
    inputs.step, inputs.merged = tmp_path / "step", tmp_path / "merged"
    merge_checkpoint(inputs.old, inputs.step, inputs.merged, progress=False)
    names = list(run(inputs, tmp_path / "a", "step").layers)
    run(inputs, tmp_path / "b", "merged", modules=names)
    first, second = (weights(inputs.models["old"], tmp_path / name) for name in "ab")
    for name in first:
        assert_same_bits(first[name], second[name])
    refused(inputs, tmp_path, ValueError, "harmonized already", new=inputs.step, output="adapter")


@pytest.mark.parametrize("option", ["use_dora", "modules_to_save"])
def test_updates_without_low_rank_are_merged_and_refused_as_adapter(tmp_path, option):
    lora = {"use_dora": True} if option == "use_dora" else {"targets": r".*language_model.*q_proj"}
    if option == "modules_to_save":
        lora["modules_to_save"] = ["down_proj"]
    inputs = make_inputs(tmp_path, dtype=torch.float32, **lora)
    inputs.models["adapted"].merge_and_unload().save_pretrained(tmp_path / "merged")
    inputs.merged = tmp_path / "merged"
    names = list(run(inputs, tmp_path / "a", "adapter").layers)
    run(inputs, tmp_path / "b", "merged", modules=names)
    first, second = (weights(inputs.models["old"], tmp_path / name) for name in "ab")
    for name in first:
        assert float((first[name] - second[name]).norm()) <= 2e-6 * float(second[name].norm() + 1e-30), name
    with pytest.raises(ValueError, match=r"cannot hold .*_proj"):
        run(inputs, tmp_path / "c", "adapter", output="adapter")
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.partial").exists()


def test_gram_files_full_and_reduced_and_grams_in_memory_give_the_same_bytes(inputs, tmp_path):
    run(inputs, tmp_path / "full")
    for name, grams in inputs.grams.items():
        save_grams(grams, tmp_path / f"{name}.safetensors", reduce="diagonal")
    arguments = inputs.arguments() | {name: tmp_path / f"{name}.safetensors" for name in ("safety", "task")}
    harmonize_checkpoint(**arguments, out=tmp_path / "reduced", progress=False)
    harmonize_checkpoint(**inputs.arguments() | inputs.grams, out=tmp_path / "memory", progress=False)
    found = [contents(tmp_path / name) for name in ("full", "reduced", "memory")]
    for files in found:
        del files["hpa_manifest.json"]  # names its inputs
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "safety.safetensors").stat().st_size < inputs.safety.stat().st_size
    with pytest.raises(ValueError, match=r"damping 0.01.*got damping 0.05"):
        harmonize_checkpoint(
            **arguments, out=tmp_path / "other", config=hpa_ext.HPAConfig(damping=0.05), progress=False
        )
    assert not (tmp_path / "other.partial").exists()


def test_gram_file_serves_harmonize_model(inputs):
    model = type(inputs.models["old"]).from_pretrained(inputs.new, dtype=torch.bfloat16)
    again = type(inputs.models["old"]).from_pretrained(inputs.new, dtype=torch.bfloat16)
    hpa_ext.harmonize_model(inputs.models["old"], model, **inputs.grams, progress=False)
    hpa_ext.harmonize_model(
        inputs.models["old"], again, safety=GramFile(inputs.safety), task=GramFile(inputs.task), progress=False
    )
    for name, tensor in model.state_dict().items():
        assert_same_bits(again.state_dict()[name], tensor)


def test_no_gram_stays_in_memory_beside_the_next_one(inputs, tmp_path):
    grams = {name: GramFile(getattr(inputs, name)) for name in ("safety", "task")}
    most = []
    read = GramFile.__getitem__

    def counted(self, name):
        gram = read(self, name)
        most.append(sum(len(file._alive) for file in grams.values()))
        return gram

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GramFile, "__getitem__", counted)
        harmonize_checkpoint(**inputs.arguments() | grams, out=tmp_path / "out", progress=False)
    assert len(most) == 2 * 3 * 4 and max(most) == 1


def test_files_are_those_of_the_input(inputs, tmp_path):
    run(inputs, tmp_path / "out", "adapter")
    before, after = CheckpointReader(inputs.old), CheckpointReader(tmp_path / "out")
    assert len(before.shards) > 1
    assert [shard.file_name for shard in before.shards] == [shard.file_name for shard in after.shards]
    assert list(before.entries) == list(after.entries)
    assert before.index() == after.index()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "hpa_manifest.json"} <= names
    assert "optimizer.pt" not in names
    for shard in after.shards:
        with safe_open(shard.path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_tied_weights_stay_tied(tmp_path):
    inputs = make_inputs(tmp_path, lambda: tiny_models.llama(tie=True))
    for new in ("new", "adapter"):
        run(inputs, tmp_path / f"out-{new}", new)
        assert not any("lm_head" in name for name in CheckpointReader(tmp_path / f"out-{new}").entries)
        model = type(inputs.models["old"]).from_pretrained(tmp_path / f"out-{new}")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_harmonizing_a_tied_head_is_told(tmp_path):
    inputs = make_inputs(tmp_path, lambda: tiny_models.llama(tie=True), torch.float32)
    grams = hpa_ext.calibrate(inputs.models["old"], tiny_models.batches(inputs.models["old"]), "lm_head", "all", False)
    report = harmonize_checkpoint(
        inputs.old, inputs.new, grams, grams, tmp_path / "out", modules="lm_head", progress=False
    )
    assert any("input embedding" in line for line in report.warnings)
    model = type(inputs.models["old"]).from_pretrained(tmp_path / "out")
    kept = report["lm_head"].retained
    assert_same_bits(model.lm_head.weight[:, kept], inputs.models["old"].lm_head.weight[:, kept])


LEGACY = {
    "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector.",
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["legacy", "canonical"])
def test_names_on_disk_of_any_generation_stay(inputs, tmp_path, dialect):
    """The old model in one generation of names, the new one in another; the output speaks the new one's."""
    state = inputs.models["new"].state_dict()
    if dialect == "legacy":
        for start, written in LEGACY.items():
            state = {written + k[len(start) :] if k.startswith(start) else k: v for k, v in state.items()}
    (tmp_path / "new").mkdir()
    save_file(state, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    (tmp_path / "new" / "config.json").write_text((inputs.new / "config.json").read_text())
    arguments = inputs.arguments() | {"new": tmp_path / "new"}
    harmonize_checkpoint(**arguments, out=tmp_path / "out", progress=False)
    run(inputs, tmp_path / "usual")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(state)
    first, second = (weights(inputs.models["old"], tmp_path / name) for name in ("out", "usual"))
    for name in first:
        assert_same_bits(first[name], second[name])


def test_manifest_tells_what_was_done(inputs, tmp_path):
    report = run(inputs, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "hpa_manifest.json").read_text())
    assert manifest["config"]["retain_max"] == 15.0 and manifest["kind"] == "checkpoint"
    assert set(manifest["inputs"]) == {"old", "old_adapters", "new", "safety", "task"}
    assert {layer["name"]: layer["retained_count"] for layer in manifest["report"]["layers"]} == {
        name: layer.retained_count for name, layer in report.layers.items()
    }
    assert {"model.safetensors.index.json", "config.json"} <= set(manifest["files"])


def refused(inputs, tmp_path, error, match, **changes):
    arguments = inputs.arguments() | {"out": tmp_path / "out", "progress": False} | changes
    with pytest.raises(error, match=match):
        harmonize_checkpoint(**arguments)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_wrong_arguments_are_refused_before_anything_is_written(inputs, tmp_path):
    refused(inputs, tmp_path, TypeError, "config: expected an HPAConfig", config={"damping": 1})
    refused(inputs, tmp_path, ValueError, "output: expected one of checkpoint, adapter", output="lora")
    refused(inputs, tmp_path, ValueError, 'output: "adapter" needs a LoRA adapter', output="adapter")
    refused(
        inputs, tmp_path, ValueError, "granularity", new=inputs.adapter, output="adapter",
        config=hpa_ext.HPAConfig(granularity="output"),
    )  # fmt: skip
    for name, wrong in {"out": None, "old": None, "new": 3, "old_adapters": 3}.items():
        refused(inputs, tmp_path, TypeError, f"{name}: expected", **{name: wrong})
    refused(inputs, tmp_path, TypeError, "old_adapters: expected a path", old_adapters=[None])
    refused(inputs, tmp_path, TypeError, "device: expected a name", device=3)
    for device in ("meta", "a potato", "cuda:99"):
        refused(inputs, tmp_path, ValueError, f"device: '{device}' cannot be used here", device=device)
    refused(inputs, tmp_path, ValueError, "tunes none of the 3", new=inputs.adapter, modules=".*language.*k_proj")
    refused(inputs, tmp_path, TypeError, "safety: expected the path of a Gram file", safety=3)
    refused(inputs, tmp_path, ValueError, "no Gram in task; it is empty", task={})
    refused(inputs, tmp_path, ValueError, "modules", modules="nothing")
    refused(inputs, tmp_path, OSError, "missing", old=tmp_path / "missing")
    refused(inputs, tmp_path, (OSError, ValueError), "missing", safety=tmp_path / "missing.safetensors")
    refused(inputs, tmp_path, ValueError, "outside the inputs", out=inputs.old / "inside")
    wrong = {name: hpa_ext.Gram(8).update(torch.ones(2, 8)) for name in inputs.grams["safety"]}
    refused(inputs, tmp_path, ValueError, "expected a Gram of 32 features in safety, got 8", safety=wrong)
    empty = {name: hpa_ext.Gram(gram.in_features) for name, gram in inputs.grams["safety"].items()}
    refused(inputs, tmp_path, ValueError, "has counted no tokens", safety=empty)


def test_an_output_that_is_there_is_not_touched(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="precious"):
        run(inputs, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_output_behind_a_link_lands_where_it_was_looked_for(inputs, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    run(inputs, tmp_path / "link" / ".." / "out")
    assert verify_checkpoint(tmp_path / "out", progress=False).ok and not (tmp_path / "elsewhere" / "out").exists()


def damaged(inputs, tmp_path, change):
    """A copy of the new checkpoint in one file, with a change made to its tensors."""
    tensors = {}
    for shard in CheckpointReader(inputs.new).shards:
        tensors |= load_file(shard.path)
    change(tensors)
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    (tmp_path / "bad" / "config.json").write_text((inputs.new / "config.json").read_text())
    return tmp_path / "bad"


def test_wrong_checkpoints_are_refused(inputs, tmp_path):
    name = next(
        name
        for name in CheckpointReader(inputs.new).entries
        if "layers.1.self_attn.q_proj" in name and "language" in name
    )
    cases = {
        "dtype": (lambda t: t.update({name: t[name].half()}), CheckpointError, "old holds BF16, new F16"),
        "missing": (lambda t: t.pop(name), CheckpointError, "lacks 1 parameters.*q_proj"),
        "shape": (lambda t: t.update({name: t[name][:5].clone()}), CheckpointError, "q_proj.*shape"),
        "name": (lambda t: t.update({"surplus.weight": t[name].clone()}), CheckpointError, "surplus.weight"),
        "nan": (lambda t: t[name][0].fill_(float("nan")), hpa_ext.NumericalError, "q_proj: layer_new.*NaN"),
    }
    for case, (change, error, match) in cases.items():
        (tmp_path / case).mkdir()
        new = damaged(inputs, tmp_path / case, change)
        with pytest.raises(error, match=match):
            harmonize_checkpoint(**inputs.arguments() | {"new": new}, out=tmp_path / case / "out", progress=False)
        assert not (tmp_path / case / "out").exists()


def test_a_truncated_shard_is_told(inputs, tmp_path):
    new = damaged(inputs, tmp_path, lambda tensors: None) / "model.safetensors"
    with open(new, "r+b") as file:
        file.truncate(new.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"100|truncated|cut"):
        harmonize_checkpoint(**inputs.arguments() | {"new": new.parent}, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_adapter_of_another_model_is_refused(inputs, tmp_path):
    other = tiny_models.with_lora(tiny_models.gpt2(), r".*c_attn", fan_in_fan_out=True)
    other.save_pretrained(tmp_path / "adapter")
    refused(inputs, tmp_path, CheckpointError, "tried.*c_attn", new=tmp_path / "adapter")
