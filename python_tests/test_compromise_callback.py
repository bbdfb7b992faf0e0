"""HarmonizeCallback with the compromise: whole Grams, and earlier tasks that are protected from task to task."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from trainer_models import trainer

from hpa_ext import CompromiseConfig, GramFile, HPAConfig, calibrate, harmonize_model, save_grams
from hpa_ext.compromise import add_task_
from hpa_ext.gram import GramCollection
from hpa_ext.training.callback import HarmonizeCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TARGETS = ["q_proj", "k_proj", "down_proj"]
CONFIG = CompromiseConfig(budget=0.2, earlier_strength=0.5)


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))


def grams(model, seed, names=None):
    return calibrate(model, tiny_models.batches(model, seed=seed), names, progress=False)


def callback(model, **options):
    return HarmonizeCallback(
        tiny_models.batches(model, seed=5), tiny_models.batches(model, seed=6), CONFIG, progress=False, **options
    )


@pytest.mark.parametrize("prepare", [lambda model: model, lora], ids=["full", "lora"])
def test_trainer_with_the_callback_equals_harmonizing_afterwards(prepare, tmp_path):
    old = tiny_models.llama()
    plain, model = prepare(copy.deepcopy(old)), prepare(copy.deepcopy(old))
    trainer(plain, tmp_path / "plain").train()
    harmonizing = callback(old)
    harmonizing.trainer = run = trainer(model, tmp_path / "harmonized", [harmonizing])
    run.train()
    names = list(harmonizing.reports[0].layers)
    assert {name.split(".")[-1] for name in names} == set(TARGETS) or prepare is not lora
    safety, task = grams(old, 5), grams(plain, 6)
    report = harmonize_model(copy.deepcopy(old), plain, safety, task, CONFIG, modules=names, progress=False)
    tiny_models.assert_unchanged(model, tiny_models.snapshot(plain))
    assert harmonizing.reports[0].to_dict() == report.to_dict()
    logged = run.state.log_history[-1]
    assert logged["compromise_layers"] == len(names) and 0.19 < logged["compromise_safety_left"] <= 0.2
    assert "compromise_earlier_left" not in logged and list(harmonizing.earlier) == names


def test_earlier_tasks_are_protected_in_the_next_ones(tmp_path):
    base = tiny_models.llama()
    harmonizing, expected = callback(base), GramCollection()
    adapted = lora(copy.deepcopy(base))
    for number in range(3):
        before = copy.deepcopy(adapted)
        harmonizing.before_task(adapted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter += 0.05 * torch.randn(parameter.shape)
        trained = copy.deepcopy(adapted)
        report = harmonizing.after_task(adapted)
        names = list(report.layers)
        task = grams(trained, 6, names)
        told = harmonize_model(
            before.merge_and_unload(), trained.merge_and_unload(), grams(before, 5, names), task, CONFIG,
            earlier=[expected] if expected else [], modules=names, progress=False,
        )  # fmt: skip
        add_task_(expected, task)
        for name in names:
            assert report[name].earlier_count == min(number, 1)
            if number == 0:
                assert report[name].earlier_left is None
            else:
                assert report[name].earlier_left == pytest.approx(told[name].earlier_left, rel=1e-3)
            assert report[name].task_lost == pytest.approx(told[name].task_lost, rel=1e-3)
            torch.testing.assert_close(
                harmonizing.earlier[name].matrix(), expected[name].matrix(), rtol=1e-4, atol=1e-5
            )
    q, k = (f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj"))
    assert harmonizing.earlier[q] is harmonizing.earlier[k]
    # A later run goes on with what was saved.
    harmonizing.save_earlier(tmp_path / "earlier.safetensors")
    for earlier in (tmp_path / "earlier.safetensors", GramFile(tmp_path / "earlier.safetensors")):
        later = callback(base, earlier=earlier)
        assert torch.equal(later.earlier[q].matrix(), harmonizing.earlier[q].matrix())
        later.before_task(copy.deepcopy(adapted))
    wider = tiny_models.with_lora(base, ["up_proj"])
    with pytest.raises(ValueError, match=r"earlier: no Gram of model\.layers\.0\.mlp\.up_proj, which is trained"):
        later.before_task(wider)


def test_opting_out_and_a_gram_file_for_safety(tmp_path):
    base = tiny_models.llama()
    safety = grams(base, 5)
    save_grams(safety, tmp_path / "safety.safetensors")
    reports = []
    for source in (safety, GramFile(tmp_path / "safety.safetensors")):
        harmonizing = HarmonizeCallback(
            source, tiny_models.batches(base, seed=6), CONFIG, protect_earlier=False, progress=False
        )
        adapted = lora(copy.deepcopy(base))
        for _ in range(2):
            trainer(adapted, tmp_path / "run", [harmonizing], save_strategy="no").train()
        assert not harmonizing.earlier and len(harmonizing.reports) == 2
        assert all(layer.earlier_count == 0 for layer in harmonizing.reports[1].layers.values())
        reports.append([report.to_dict() for report in harmonizing.reports])
    assert reports[0] == reports[1]


def test_wrong_arguments(tmp_path):
    base = tiny_models.llama()
    batches = tiny_models.batches(base)
    task = grams(base, 6)
    for config, options, message in (
        (CONFIG, {"passes": 2}, "passes: expected 1 with the compromise"),
        (CONFIG, {"earlier": task, "protect_earlier": False}, "earlier: expected none without protect_earlier"),
        (HPAConfig(), {"earlier": task}, "earlier: expected none without protect_earlier and a CompromiseConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            HarmonizeCallback(batches, batches, config, **options)
    with pytest.raises(ValueError, match="there is no task yet"):
        callback(base).save_earlier(tmp_path / "x.safetensors")
    save_grams(task, tmp_path / "diagonal.safetensors", reduce="diagonal")
    harmonizing = HarmonizeCallback(GramFile(tmp_path / "diagonal.safetensors"), batches, CONFIG, progress=False)
    with pytest.raises(TypeError, match="safety: a GramDiagonal holds the diagonal of the inverse alone"):
        harmonizing.before_task(base)


def test_sharded_weights_are_refused_before_the_training(monkeypatch):
    """Not when all steps are done. A DTensor is stood in for: the refusal is the same whatever shards the weights."""
    from hpa_ext.compromise import layer

    base = tiny_models.llama()
    monkeypatch.setattr(layer, "is_sharded", lambda weight: True)
    with pytest.raises(ValueError, match=r"q_proj: model: the compromise does not take DTensors"):
        callback(base).before_task(base)
