"""The compromise from disk to disk: against the model in memory, and against the adapter merged."""

from __future__ import annotations

import copy
import json

import adapter_models
import pytest
import torch
from checkpoint_files import contents
from compromise_adapters import FILE, make
from harmonize_inputs import make_inputs
from test_harmonize_checkpoint_distributed import on_processes

import hpa_ext
from hpa_ext import (
    CompromiseConfig,
    CompromiseReport,
    GramDiagonal,
    HPAConfig,
    NumericalError,
    harmonize_checkpoint,
    plan_checkpoint,
    save_grams,
)
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.cli.main import main
from hpa_ext.compromise.checkpoint import CompromiseMethod

CONFIG = CompromiseConfig(strength=0.5)
BUDGET = CompromiseConfig(budget=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def weights(path):
    with_model = CheckpointWeights(path)
    return {name: with_model.tensor(name) for name in with_model.disk_name}


@pytest.mark.parametrize("config", [CONFIG, BUDGET], ids=["strength", "budget"])
def test_of_a_checkpoint_it_is_what_harmonize_model_does(inputs, tmp_path, config):
    report = harmonize_checkpoint(**inputs.arguments(), out=tmp_path / "out", config=config, progress=False)
    new = adapter_models.load(inputs.new)
    in_memory = hpa_ext.harmonize_model(
        inputs.models["old"], new, inputs.grams["safety"], inputs.grams["task"], config, progress=False
    )
    assert isinstance(report, CompromiseReport) and report.layers == in_memory.layers
    expected = new.state_dict()
    found = weights(tmp_path / "out")
    assert all(torch.equal(value, expected[name]) for name, value in found.items()) and len(found) > 50
    assert hpa_ext.verify_checkpoint(tmp_path / "out", progress=False).ok
    manifest = json.loads((tmp_path / "out" / "hpa_manifest.json").read_text())
    assert manifest["config"]["method"] == "compromise" and len(manifest["report"]["layers"]) == len(report)


@pytest.mark.parametrize("config", [CONFIG, BUDGET], ids=["strength", "budget"])
def test_of_an_adapter_it_is_the_harmonized_adapter_merged(inputs, tmp_path, config):
    arguments = inputs.arguments("adapter")
    whole = harmonize_checkpoint(**arguments, out=tmp_path / "whole", config=config, progress=False)
    report = harmonize_checkpoint(
        **arguments, out=tmp_path / "adapter", config=config, output="adapter", progress=False
    )
    assert report.layers == whole.layers
    hpa_ext.merge_checkpoint(inputs.old, tmp_path / "adapter", tmp_path / "merged", progress=False)
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "merged")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    old = weights(inputs.old)
    changed = {name for name in old if not torch.equal(old[name], ours[name])}
    # The fixture's adapter tunes the vision tower too, which is no part of the decoder.
    assert {name for name in changed if "vision_tower" not in name} == {f"{name}.weight" for name in report.layers}


def test_a_peft_model_in_memory_is_the_same_model(inputs, tmp_path):
    """In bfloat16, where the difference of merged weights would hold the rounding of the weights, too."""
    report = harmonize_checkpoint(**inputs.arguments("adapter"), out=tmp_path / "out", config=BUDGET, progress=False)
    model = copy.deepcopy(inputs.models["adapted"])
    in_memory = hpa_ext.harmonize_model(
        model.get_base_model(), model, inputs.grams["safety"], inputs.grams["task"], BUDGET,
        modules=list(report.layers), progress=False,
    )  # fmt: skip
    assert in_memory.layers == report.layers
    found, merged = weights(tmp_path / "out"), model.merge_and_unload().state_dict()
    assert all(torch.equal(found[f"{name}.weight"], merged[f"{name}.weight"]) for name in report.layers)
    assert found["model.language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_dora_is_taken_as_a_dense_update(tmp_path):
    made = make(tmp_path, use_dora=True)
    report = harmonize_checkpoint(
        made.base, made.adapter, made.safety, made.task, tmp_path / "out", CONFIG, progress=False
    )
    tuned = adapter_models.load(made.base)
    tuned.load_state_dict(adapter_models.merged_by_peft(made.base, made.adapter))
    hpa_ext.harmonize_model(
        adapter_models.load(made.base), tuned, made.safety, made.task, CONFIG, modules=list(report.layers),
        progress=False,
    )  # fmt: skip
    found = weights(tmp_path / "out")
    for name in report.layers:
        adapter_models.assert_equal_to_rounding(found[f"{name}.weight"], tuned.state_dict()[f"{name}.weight"], name)


def test_a_transposed_weight(tmp_path):
    made = make(tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    arguments = {"old": made.base, "new": made.adapter, "safety": made.safety, "task": made.task, "config": BUDGET}
    harmonize_checkpoint(**arguments, out=tmp_path / "out", progress=False)
    harmonize_checkpoint(**arguments, out=tmp_path / "kept", output="adapter", progress=False)
    merged = adapter_models.merged_by_peft(made.base, tmp_path / "kept")
    for name, value in weights(tmp_path / "out").items():
        adapter_models.assert_equal_to_rounding(value, merged[name], name)


def test_ends_are_the_old_and_the_tuned_model(inputs, tmp_path):
    for budget, path in ((0, inputs.old), (1, None)):
        out = tmp_path / str(budget)
        harmonize_checkpoint(
            **inputs.arguments("adapter"), out=out, config=CompromiseConfig(budget=budget), progress=False
        )
        if path is None:
            path = tmp_path / "plain"
            hpa_ext.merge_checkpoint(inputs.old, inputs.adapter, path, progress=False)
        expected, found = weights(path), weights(out)
        assert all(torch.equal(found[name], expected[name]) for name in expected if "vision_tower" not in name)


def test_earlier_tasks(inputs, tmp_path):
    arguments = {**inputs.arguments("adapter"), "config": CONFIG, "progress": False}
    report = harmonize_checkpoint(**arguments, out=tmp_path / "with", earlier=[inputs.task])
    harmonize_checkpoint(**arguments, out=tmp_path / "without")
    assert all(layer.earlier_count == 1 for layer in report.layers.values())
    ours, others = weights(tmp_path / "with"), weights(tmp_path / "without")
    name = f"{next(iter(report.layers))}.weight"
    assert not torch.equal(ours[name], others[name])
    assert "earlier[0]" in json.loads((tmp_path / "with" / "hpa_manifest.json").read_text())["inputs"]


def test_it_goes_on_with_the_same_bytes(inputs, tmp_path, monkeypatch):
    arguments = {**inputs.arguments(), "config": BUDGET, "progress": False}
    expected = harmonize_checkpoint(**arguments, out=tmp_path / "whole")
    merge = CompromiseMethod.merge
    count = 0

    def interrupted(self, job, reduced, module, update):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return merge(self, job, reduced, module, update)

    monkeypatch.setattr(CompromiseMethod, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
        harmonize_checkpoint(**arguments, out=tmp_path / "out")
    monkeypatch.setattr(CompromiseMethod, "merge", merge)
    with pytest.raises(hpa_ext.CheckpointError, match=r"config\.budget: was 0.1, is 0.2"):
        harmonize_checkpoint(**arguments | {"config": CompromiseConfig(budget=0.2)}, out=tmp_path / "out", resume=True)
    report = harmonize_checkpoint(**arguments, out=tmp_path / "out", resume=True)
    assert report.layers == expected.layers
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = harmonize_checkpoint(**arguments, out=tmp_path / "out", resume=True)
    assert again.layers == report.layers


def test_what_does_not_fit_is_refused_before_anything_is_written(inputs, tmp_path):
    diagonal = {name: GramDiagonal.of(gram) for name, gram in inputs.grams["safety"].items()}
    bad = dict(inputs.grams["task"])
    bad[next(iter(bad))] = hpa_ext.Gram(bad[next(iter(bad))].in_features)
    default = {**inputs.arguments(), "out": tmp_path / "out", "config": CONFIG, "progress": False}
    cases = [
        ({"safety": diagonal}, TypeError, "safety: a GramDiagonal holds the diagonal"),
        ({"task": bad}, ValueError, "counted no tokens"),
        ({"task": {}}, ValueError, "no Gram in task"),
        ({"earlier": [{}]}, ValueError, r"no Gram in earlier\[0\]"),
        ({"output": "lora"}, ValueError, "output: expected one of checkpoint, adapter"),
        ({"output": "adapter"}, ValueError, 'output: "adapter" needs a LoRA adapter'),
        ({"config": HPAConfig(), "earlier": [inputs.task]}, ValueError, "earlier: HPA has no place"),
        ({"config": {"strength": 1}}, TypeError, "config: expected an HPAConfig or a CompromiseConfig, got dict"),
        ({"modules": "no"}, ValueError, "modules: no linear layer"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            harmonize_checkpoint(**default | changes)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_numbers_that_fail_name_the_module(inputs, tmp_path):
    name = next(iter(inputs.grams["task"]))
    task = dict(inputs.grams["task"])
    width = task[name].in_features
    task[name] = hpa_ext.Gram(width).update(torch.zeros(4, width))
    with pytest.raises(NumericalError, match=f"{name}: gram.task: the matrix is zero"):
        harmonize_checkpoint(
            inputs.old, inputs.new, inputs.grams["safety"], task, tmp_path / "out", CONFIG, progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("new", "config"), [("adapter", BUDGET), ("new", CONFIG)])
def test_several_processes_write_the_same_bytes(inputs, tmp_path, new, config):
    arguments = {**inputs.arguments(new), "config": config, "progress": False}
    expected = harmonize_checkpoint(**arguments, out=tmp_path / "one")
    told = on_processes(2, tmp_path / "ranks", lambda rank: harmonize_checkpoint(**arguments, out=tmp_path / "many"))
    assert told == [str(expected)] * 2
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    told = on_processes(
        2, tmp_path / "again", lambda rank: harmonize_checkpoint(**arguments, out=tmp_path / "a", output="adapter")
    )
    assert all("Error" in text and "adapter" in text for text in told) and not (tmp_path / "a").exists()


def words(inputs, out, new, *more):
    return [
        "harmonize", "--old", str(inputs.old), "--new", str(new), "--safety", str(inputs.safety),
        "--task", str(inputs.task), "--out", str(out), *more,
    ]  # fmt: skip


def test_on_the_command_line(inputs, tmp_path, capsys):
    more = ["--method", "compromise", "--budget", "0.1", "--json", str(tmp_path / "report.json")]
    assert main(words(inputs, tmp_path / "out", inputs.adapter, *more)) == 0
    assert "safety left" in capsys.readouterr().out
    harmonize_checkpoint(**inputs.arguments("adapter"), out=tmp_path / "same", config=BUDGET, progress=False)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "same")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert main(words(inputs, tmp_path / "kept", inputs.adapter, *more[:4], "--output", "adapter", "--quiet")) == 0
    assert (tmp_path / "kept" / FILE).is_file() and not (tmp_path / "kept" / "hpa_gain.safetensors").exists()
    for wrong, message in (
        (["--method", "compromise", "--retain-max", "20"], "--retain-max: is no setting of --method compromise"),
        (["--budget", "0.1"], "--budget: is no setting of --method hpa"),
        (["--earlier", str(inputs.task)], "--earlier: is no setting of --method hpa"),
    ):
        assert main(words(inputs, tmp_path / "no", inputs.adapter, *wrong)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("new", "output"), [("new", "checkpoint"), ("adapter", "checkpoint"), ("adapter", "adapter")])
def test_the_plan_knows_what_the_run_will_do(inputs, tmp_path, new, output):
    arguments = inputs.arguments(new) | {"out": tmp_path / "out", "output": output}
    plan = plan_checkpoint(**arguments, config=BUDGET)
    assert plan.output == output and plan.fits and not (tmp_path / "out").exists()
    report = harmonize_checkpoint(**arguments, config=BUDGET, progress=False)
    assert plan.modules == len(report)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert plan.write_bytes == pytest.approx(written, rel=0.5)
    assert "to harmonize" in str(plan) and all(value >= 0 for value in plan.seconds.values())
    # One strength takes one factor for all linears of an input, a budget about four for each linear.
    fixed = plan_checkpoint(**arguments | {"out": tmp_path / "other"}, config=CONFIG)
    protected = plan_checkpoint(
        **arguments | {"out": tmp_path / "other"}, config=CONFIG, earlier=[inputs.grams["task"]]
    )
    assert protected.grams == 1.5 * fixed.grams == 1.5 * plan.grams
    work = [one.seconds["factor"] * one.rates["factor"] for one in (fixed, plan)]
    assert work[1] > 4 * work[0] and protected.memory_bytes > fixed.memory_bytes
    with pytest.raises(FileExistsError):
        plan_checkpoint(**arguments, config=CONFIG)
    with pytest.raises(ValueError, match="output: expected one of checkpoint, adapter"):
        plan_checkpoint(**arguments | {"output": "lora"}, config=CONFIG)
    with pytest.raises(ValueError, match="earlier: HPA has no place"):
        plan_checkpoint(**arguments, config=HPAConfig(), earlier=[inputs.grams["task"]])


def test_the_plan_from_the_command_line(inputs, tmp_path, capsys):
    words = inputs.arguments()
    for name in ("safety", "task"):
        save_grams(inputs.grams[name], tmp_path / f"{name}.safetensors")
        words[name] = tmp_path / f"{name}.safetensors"
    flags = [str(word) for name, path in words.items() for word in (f"--{name}", path)]
    assert main(["harmonize", "--method", "compromise", "--plan", *flags, "--out", str(tmp_path / "out")]) == 0
    assert "factor" in capsys.readouterr().out and not (tmp_path / "out").exists()
