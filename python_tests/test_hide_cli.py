"""``hpa-ext hide`` on the embedded model: build, add, remove, show, route, cka, merge, export."""

from __future__ import annotations

import argparse
import json

import hide_models as hm
import pytest
import torch
from peft import PeftModel
from PIL import Image

from hpa_ext.cli import hide as command
from hpa_ext.data.collate import collate_prompts
from hpa_ext.data.samples import Sample
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.hide import Anchors, HiDeModel, own_features
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.export import export_adapter
from hpa_ext.hide.persistence import load_parts
from hpa_ext.models.embedded import embedded_path, load_embedded
from hpa_ext.training.hide_expert import ANCHORS_FILE

BASE = str(embedded_path())
TASKS = ("kind", "reading")


def hide(*arguments):
    top = argparse.ArgumentParser()
    command.add_parser(top.add_subparsers())
    args = top.parse_args(["hide", *map(str, arguments)])
    return args.run(args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters of two tasks with their anchors beside them, of a third without, and data of each."""
    folder = tmp_path_factory.mktemp("hide")
    model, processor = load_embedded()
    features = own_features(model, processor.tokenizer)
    for number, task in enumerate((*TASKS, "compass")):
        export_adapter(hm.expert(model, task, seed=number, scale=0.1), folder / task)
        records = []
        for row, sample in enumerate(draw_task(task, 6, number)):
            Image.fromarray(sample.image).save(folder / f"{task}-{row}.png")
            records.append({
                "id": f"{task}-{row}", "image": f"{task}-{row}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{sample.instruction}"},
                    {"from": "gpt", "value": sample.answer},
                ],
            })  # fmt: skip
        (folder / f"{task}.json").write_text(json.dumps(records))
        if task in TASKS:
            anchors = Anchors(features.describe())
            batch = collate_prompts(processor, draw_task(task, 6, number))
            image = features.image(model.model.vision_tower(batch["pixel_values"]))
            text = features.text(
                batch["input_ids"], batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_id)
            )
            anchors.update(task, image, text).save(folder / task / ANCHORS_FILE)
    hide("build", "--base", BASE, "--adapter", f"kind={folder / 'kind'}", "--adapter", f"reading={folder / 'reading'}",
         "--out", folder / "model", "--temperature", "0.2", "--coefficient", "0.5")  # fmt: skip
    return folder


def test_build_takes_the_anchors_that_training_left(folder, capsys):
    experts, anchors, config, settings = load_parts(folder / "model")
    assert [expert.task for expert in experts] == list(TASKS)
    assert anchors.count("kind", "image") == 6
    assert (config.temperature, config.coefficient("kind"), config.top_layers) == (0.2, 0.5, 1)
    assert settings["base"]["name"] == BASE
    assert hide("show", folder / "model", "--base", BASE) == 0
    shown = capsys.readouterr().out
    assert "reading" in shown
    assert "44.27" in shown
    assert "23.11" in shown  # 37 experts of rank 8 in LLaVA-1.5-7B, in millions


def test_anchors_from_data_are_those_of_the_samples(folder, tmp_path):
    hide("build", "--base", BASE, "--dtype", "float32", "--adapter", f"kind={folder / 'kind'}", "--data",
         f"kind={folder / 'kind.json'}", "--out", tmp_path / "model")  # fmt: skip
    _, anchors, _, _ = load_parts(tmp_path / "model")
    left = Anchors.load(folder / "kind" / ANCHORS_FILE)
    assert anchors.features == left.features
    for modality in ("image", "text"):
        assert anchors.count("kind", modality) == 6
        torch.testing.assert_close(anchors.mean("kind", modality), left.mean("kind", modality), rtol=1e-3, atol=1e-4)


def test_add_and_remove_in_place(folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    hide("add", model, "--base", BASE, "--adapter", f"compass={folder / 'compass'}", "--data",
         f"compass={folder / 'compass.json'}", "--coefficient", "0.25")  # fmt: skip
    experts, anchors, config, _ = load_parts(model)
    assert [expert.task for expert in experts] == anchors.tasks == [*TASKS, "compass"]
    assert (config.coefficient("kind"), config.coefficient("compass")) == (0.5, 0.25)
    assert HiDeModel.load(model, load_embedded()[0]).tasks == [*TASKS, "compass"]
    hide("remove", model, "--task", "kind")
    experts, anchors, _, _ = load_parts(model)
    assert [expert.task for expert in experts] == anchors.tasks == ["reading", "compass"]
    assert len(list(model.glob("expert-*"))) == 2
    hide("add", model, "--base", BASE, "--adapter", f"kind={folder / 'kind'}")
    assert load_parts(model)[1].tasks == ["reading", "compass", "kind"]
    with pytest.raises(ValueError, match="expected a new one, got 'kind'"):
        hide("add", model, "--base", BASE, "--adapter", f"kind={folder / 'kind'}")
    with pytest.raises(ValueError, match="anchors: expected those of 'more'"):
        hide("add", model, "--base", BASE, "--adapter", f"more={folder / 'compass'}")


def test_route_shows_what_the_model_uses(folder, capsys):
    base, processor = load_embedded(torch.bfloat16)
    model = HiDeModel.load(folder / "model", base)
    sample = draw_task("kind", 1, 0)[0]
    batch = collate_prompts(processor, [Sample(sample.image, sample.instruction, "")])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    arguments = ("route", folder / "model", "--base", BASE, "--json")
    hide(*arguments, "--text", sample.instruction, "--image", folder / "kind-0.png")
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == list(TASKS)
    torch.testing.assert_close(torch.tensor(found["weights"]), model.routing(**batch))
    hide(*arguments, "--data", folder / "kind.json", "--samples", "4")
    rows = torch.tensor(json.loads(capsys.readouterr().out)["weights"])
    assert rows.shape == (4, 2)
    assert bool((rows[:, 0] > 0.5).all())  # prompts of its own task
    hide("route", folder / "model", "--base", BASE, "--text", "read the signal clockwise")
    assert "reading" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--text, --data: expected one of them"):
        hide(*arguments)


def test_cka_writes_numbers_and_pictures(folder, tmp_path, capsys):
    hide("cka", folder / "model", "--base", BASE, "--data", folder / "kind.json", "--out", tmp_path / "cka",
         "--batch-size", "3")  # fmt: skip
    report = json.loads((tmp_path / "cka" / "cka.json").read_text())
    assert report["samples"] == 6
    assert len(report["mean"]) == len(report["layers"]) == 4
    assert report["tasks"] == list(TASKS)
    assert {path.name for path in (tmp_path / "cka").iterdir()} == {"cka.json", "cka-heat-maps.png", "cka-curve.png"}
    assert "suggested top layers" in capsys.readouterr().out
    hide("cka", folder / "model", "--base", BASE, "--out", tmp_path / "own", *(
        part for task in TASKS for part in ("--data", f"{task}={folder / task}.json")
    ))  # fmt: skip
    assert (tmp_path / "own" / "cka.json").is_file()


def test_merge_writes_a_checkpoint_for_transformers(folder, tmp_path):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    processor = LlavaProcessor.from_pretrained(BASE)
    batch = collate_prompts(processor, draw_task("kind", 2, 3))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model = HiDeModel.load(folder / "model", load_embedded(torch.bfloat16)[0])
    for which in (("--task", "reading"), ("--fused",)):
        out = tmp_path / which[-1].strip("-")
        hide("merge", folder / "model", "--base", BASE, *which, "--out", out)
        merged = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16).eval()
        LlavaProcessor.from_pretrained(out)
        if which[0] == "--task":
            with model.routed("reading"):
                expected = model(**batch).logits.detach()
        else:
            model.configure(model.config.replace(top_role="none"))
            expected = model(**batch).logits.detach()
        error = (merged(**batch).logits - expected).detach().abs().max() / expected.abs().max()
        assert float(error) < 0.02  # bfloat16: the expert rounded into the weight against beside it


def test_export_gives_back_the_adapter(folder, tmp_path):
    from safetensors.torch import load_file

    hide("export", folder / "model", "--task", "kind", "--out", tmp_path / "kind")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder / "kind", tmp_path / "kind"))
    assert set(first) == set(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    hide("export", folder / "model", "--fused", "--base", BASE, "--out", tmp_path / "fused")
    fused = PeftModel.from_pretrained(load_embedded()[0], tmp_path / "fused")
    names = [name for name, _ in fused.named_parameters() if "lora_A" in name]
    assert len(names) == 21  # three of four layers
    with pytest.raises(ValueError, match="--base: expected the base model"):
        hide("export", folder / "model", "--fused", "--out", tmp_path / "none")
    with pytest.raises(ValueError, match="--task: expected one of kind, reading, got 'no'"):
        hide("export", folder / "model", "--task", "no", "--out", tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "kind"), "--adapter: expected TASK=PATH, got 'kind'"),
        (("--adapter", "a=x", "--adapter", "a=y"), "--adapter: expected each task once"),
        (("--adapter", "kind={folder}/kind", "--coefficient", "x"), "--coefficient: expected a number"),
        (("--adapter", "kind={folder}/kind", "--coefficient", "no=1"), "fusion_coefficients: expected tasks of kind"),
        (("--adapter", "kind={folder}/kind", "--top-layers", "9"), "top_layers: expected at most the model's 4"),
        (("--adapter", "compass={folder}/compass"), "anchors: expected those of every task"),
        (("--adapter", "kind={folder}/kind", "--adapter", "compass={folder}/compass"), "anchors: expected .*compass"),
        (("--adapter", "kind={folder}/kind", "--image-feature", "projected", "--data", "kind={folder}/kind.json"),
         "clip: expected the CLIP model"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused_and_nothing_is_written(folder, tmp_path, arguments, message):
    given = [argument.format(folder=folder) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        hide("build", "--base", BASE, *given, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_fused_part_is_exported_with_the_projector_that_acts(folder, tmp_path):
    found = [hm.expert(load_embedded()[0], task, seed=number, scale=0.1) for number, task in enumerate(TASKS)]
    for expert in found:
        export_adapter(expert, tmp_path / expert.task)
    hide("build", "--base", BASE, *(part for task in TASKS for part in ("--adapter", f"{task}={tmp_path / task}")),
         "--out", tmp_path / "model", "--top-role", "none", "--projector", "mean")  # fmt: skip
    hide("export", tmp_path / "model", "--fused", "--base", BASE, "--out", tmp_path / "fused")
    base = load_embedded()[0]
    exported = read_expert("fused", tmp_path / "fused", base)
    assert len(exported.updates) == 21
    assert len(exported.projector) == 4
    dtype = next(iter(exported.projector.values())).dtype  # that of the file
    for name, value in exported.projector.items():
        mean = sum(expert.projector[name].double() for expert in found) / 2
        torch.testing.assert_close(value, mean.to(dtype), rtol=0, atol=0)
    assert len(PeftModel.from_pretrained(base, tmp_path / "fused").modules_to_save) == 1
    # A model that routes nothing needs no anchors, and then takes none from beside an adapter.
    hide("add", tmp_path / "model", "--base", BASE, "--adapter", f"more={folder / 'kind'}")
    assert load_parts(tmp_path / "model")[1] is None


def test_anchors_of_another_name_are_refused_with_what_to_do(folder, tmp_path):
    with pytest.raises(ValueError, match=r"kind.hide_anchors.safetensors: expected anchors of 'x', got kind; call the"):
        hide("build", "--base", BASE, "--adapter", f"x={folder / 'kind'}", "--out", tmp_path / "out")
