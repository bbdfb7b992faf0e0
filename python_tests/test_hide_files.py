"""HiDe models and exported adapters on disk: whole or not at all, and refused when broken."""

from __future__ import annotations

import json

import hide_models as hm
import pytest
import torch
from helpers import refuses
from peft import PeftModel

from hpa_ext.hide import Anchors, EmbeddingText, Features, HiDeConfig, HiDeModel, ImageFeature
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.export import export_adapter, fused_expert
from hpa_ext.hide.persistence import add_expert, load_parts
from hpa_ext.hide.tensor_files import read_tensors, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_model(tmp_path, dtype):
    model = hm.hide(dtype=dtype, config=HiDeConfig(top_layers=2, fusion_coefficients={"beta": 0.5}))
    assert model.save(tmp_path / "hide") == tmp_path / "hide"
    again = HiDeModel.load(tmp_path / "hide", hm.llava_of(dtype))
    assert again.tasks == model.tasks
    assert again.config == model.config
    hm.assert_same_state(again.model, hm.state_of(model.model))
    batch = hm.prompts()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    assert torch.equal(again.routing(**batch), model.routing(**batch))
    assert sorted(path.suffix for path in (tmp_path / "hide").iterdir()) == [".json"] + [".safetensors"] * 4
    with refuses(ValueError, "directory"):
        model.save(tmp_path / "hide")
    other = HiDeModel.load(tmp_path / "hide", hm.llava_of(dtype), config=HiDeConfig())
    assert other.config.top_layers == 1


def test_broken_directories_are_refused_by_name(tmp_path):
    model = hm.hide()
    path = model.save(tmp_path / "hide")
    with pytest.raises(ValueError, match="expected a base of class LlavaForConditionalGeneration"):
        HiDeModel.load(path, hm.llama_of())
    expert = path / "expert-0001.safetensors"
    content = expert.read_bytes()
    expert.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"expert-0001\.safetensors: expected a whole"):
        load_parts(path)
    expert.write_bytes((path / "expert-0000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="expected the expert of 'beta', got 'alpha'"):
        load_parts(path)
    settings = json.loads((path / "hide.json").read_text())
    (path / "hide.json").write_text(json.dumps({**settings, "format": 9}))
    with pytest.raises(ValueError, match="expected format 1, got 9"):
        load_parts(path)
    with pytest.raises(FileNotFoundError, match=r"hide\.json"):
        load_parts(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    from hpa_ext.hide import persistence

    def failing(path, expert):
        raise OSError("disk full")

    model = hm.hide()
    monkeypatch.setattr(persistence, "write_expert", failing)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "hide")
    assert list(tmp_path.iterdir()) == []


def test_exported_adapters_load_in_peft(tmp_path):
    model = hm.hide(config=HiDeConfig(projector="routed", fusion_coefficients=0.5))
    batch = hm.prompts()
    export_adapter(model.experts[1], tmp_path / "beta", "base")
    with model.routed("beta"):
        model.configure(model.config.replace(top_layers=3))
        expected = model(**batch).logits
    loaded = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "beta").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    hm.same_expert(read_expert("beta", tmp_path / "beta", hm.llava_of()), model.experts[1])

    model.configure(HiDeConfig(top_role="none", projector="base", fusion_coefficients=0.5))
    export_adapter(fused_expert(model.assignments()), tmp_path / "fused")
    loaded = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "fused").eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    with refuses(ValueError, "directory"):
        export_adapter(model.experts[0], tmp_path / "beta")
    gained = Expert(
        "g",
        {name: ExpertUpdate(u.a, u.b, 1.0, torch.ones(u.a.shape[1])) for name, u in model.experts[0].updates.items()},
    )
    with pytest.raises(ValueError, match="has a column gain"):
        export_adapter(gained, tmp_path / "gained")


def test_exported_ranks_and_scalings_may_differ(tmp_path):
    base = hm.llava_of()
    uneven = hm.expert(base, "a", rank=2, seed=1)
    names = list(uneven.updates)
    for number, name in enumerate(names):
        if number % 3 == 0:
            old = hm.expert(base, "a", rank=5, seed=number, modules=[name]).updates[name]
            uneven.updates[name] = ExpertUpdate(old.a, old.b, 0.25 * (1 + number % 2))
    export_adapter(uneven, tmp_path / "a")
    hm.same_expert(read_expert("a", tmp_path / "a", base), uneven)
    batch = hm.prompts()
    loaded = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "a").eval()
    model = HiDeModel(base, {"a": uneven}, hm.anchors_of(base, ("a",)))
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def changed(path, change):
    settings = json.loads((path / "hide.json").read_text())
    change(settings)
    (path / "hide.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("config"), "config: expected it as `save` writes it, got None"),
        (lambda s: s.update(experts=["alpha"]), "experts: expected it as `save` writes it"),
        (lambda s: s["experts"].update(alpha=".."), "'alpha': expected the name of a file, got '..'"),
        (lambda s: s["experts"].update(alpha="../x"), "expected the name of a file"),
        (lambda s: s["config"].update(temperature=0), r"hide\.json: temperature: expected a positive number"),
        (lambda s: s.update(features="x"), "features: expected it as"),
        (lambda s: s["base"].pop("class"), "expected a base of class None"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path, change, message):
    path = hm.hide().save(tmp_path / "hide")
    changed(path, change)
    with pytest.raises(ValueError, match=message):
        HiDeModel.load(path, hm.llava_of())


def test_an_expert_without_its_metadata_is_refused(tmp_path):
    path = hm.hide().save(tmp_path / "hide") / "expert-0000.safetensors"
    tensors, metadata = (dict(part) for part in read_tensors(path))
    for wrong in ({**metadata, "scaling": "[1]"}, {key: value for key, value in metadata.items() if key != "task"}):
        write_tensors(path, tensors, wrong)
        with pytest.raises(ValueError, match="expected a task and scalings in the metadata"):
            load_parts(path.parent)
    name = "model.language_model.layers.0.self_attn.q_proj"
    write_tensors(path, {key: value for key, value in tensors.items() if key != f"{name}.lora_B"}, metadata)
    with pytest.raises(ValueError, match=f"expected A and B of {name}"):
        load_parts(path.parent)


def test_one_tensor_under_two_names_is_saved(tmp_path):
    base = hm.llava_of()
    expert = hm.expert(base, "a")
    first, second = list(expert.updates)[:2]
    expert.updates[second] = ExpertUpdate(expert.updates[first].a, expert.updates[second].b, 1.0)
    export_adapter(expert, tmp_path / "adapter")
    hm.same_expert(read_expert("a", tmp_path / "adapter", base), expert)


def test_the_working_directory_is_no_place_to_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(ValueError, "directory"):
        hm.hide().save(".")
    assert list(tmp_path.iterdir()) == []


def test_features_of_the_model_s_own_are_found_again(tmp_path):
    base = hm.llava_of()
    features = Features(ImageFeature("mean"), EmbeddingText(base.get_input_embeddings(), [5]))
    model = HiDeModel(base, hm.experts(base), hm.anchors_of(base, features=features), features=features)
    again = HiDeModel.load(model.save(tmp_path / "hide"), hm.llava_of())
    batch = hm.prompts()
    assert torch.equal(again.routing(**batch), model.routing(**batch))


def test_a_model_whose_tasks_are_all_gone_is_saved_and_filled_again(tmp_path):
    model = hm.hide()
    for task in hm.TASKS:
        model.remove(task)
    path = model.save(tmp_path / "hide")
    assert HiDeModel.load(path, hm.llava_of()).tasks == []
    base = hm.llava_of()
    add_expert(path, hm.expert(base, "beta", seed=11), base, hm.anchors_of(base))
    again = HiDeModel.load(path, hm.llava_of())
    assert again.tasks == again.anchors.tasks == ["beta"]


def test_adding_what_does_not_fit_leaves_the_directory_as_it_was(tmp_path):
    """Each would make a model that cannot be loaded."""
    base = hm.llava_of()
    uneven, anchors = hm.expert(base, "delta", rank=5), hm.anchors_of(base, ("delta",))
    factors = hm.hide(config=HiDeConfig(fusion="factors")).save(tmp_path / "factors")
    found = hm.experts(base)
    bare = HiDeModel(hm.llava_of(), found, None, HiDeConfig(top_layers=0)).save(tmp_path / "bare")
    for path, given, message in (
        (factors, anchors, "of equal rank"),
        (bare, anchors, "expected those of task 'alpha'"),
    ):
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(ValueError, match=message):
            add_expert(path, uneven, base, given)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    with pytest.raises(ValueError, match="expected a base of class LlavaForConditionalGeneration"):
        add_expert(bare, uneven, hm.llama_of())
    add_expert(bare, uneven, base)
    assert HiDeModel.load(bare, base).tasks == [*hm.TASKS, "delta"]


@pytest.mark.parametrize("cut", ["write_expert", "save", "_write_settings"])
def test_adding_that_is_cut_off_leaves_the_old_model_and_can_be_done_again(tmp_path, monkeypatch, cut):
    from hpa_ext.hide import persistence

    def killed(*arguments):
        raise KeyboardInterrupt

    path = hm.hide().save(tmp_path / "hide")
    base = hm.llava_of()
    extra, anchors = hm.expert(base, "delta", seed=9), hm.anchors_of(base, ("delta",))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Anchors if cut == "save" else persistence, cut, killed)
        add_expert(path, extra, base, anchors)
    again = HiDeModel.load(path, hm.llava_of())
    assert again.tasks == again.anchors.tasks == list(hm.TASKS)
    assert torch.equal(again(**hm.prompts()).logits, hm.hide()(**hm.prompts()).logits)
    add_expert(path, extra, base, anchors)
    assert HiDeModel.load(path, hm.llava_of()).tasks == [*hm.TASKS, "delta"]


def test_a_plain_linear_projector_is_exported_by_its_name(tmp_path):
    base = hm.llama_of()
    expert = hm.expert(base, "a")
    expert.projector["model.mm_projector.weight"] = torch.ones(2, 2)
    config = json.loads((export_adapter(expert, tmp_path / "a") / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["mm_projector"]
