"""HarmonizeCallback with the compromise: whole Grams, and earlier tasks that are protected from task to task."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from trainer_models import trainer

from hpa_ext import (
    CompromiseConfig,
    Gram,
    GramDiagonal,
    GramFile,
    HPAConfig,
    calibrate,
    harmonize_model,
    save_grams,
)
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
    with pytest.raises(TypeError, match=r"safety: .*diagonal\.safetensors holds diagonals of inverses"):
        harmonizing.before_task(base)


def test_sharded_weights_are_refused_before_the_training(monkeypatch):
    """Not when all steps are done. A DTensor is stood in for: the refusal is the same whatever shards the weights."""
    from hpa_ext.compromise import layer

    base = tiny_models.llama()
    monkeypatch.setattr(layer, "is_sharded", lambda weight: True)
    with pytest.raises(ValueError, match=r"q_proj: model: the compromise does not take DTensors"):
        callback(base).before_task(base)


def lora_on(model, *targets):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=list(targets)))


def test_grams_that_do_not_fit_are_refused_before_the_training(tmp_path):
    base = tiny_models.llama()
    task = grams(base, 6)
    save_grams(task, tmp_path / "diagonal.safetensors", reduce="diagonal")
    with pytest.raises(TypeError, match="holds diagonals of inverses"):
        callback(base, earlier=tmp_path / "diagonal.safetensors")
    narrow = GramCollection({name: Gram(5).update(torch.ones(3, 5)) for name in task})
    empty = GramCollection({name: Gram(one.in_features) for name, one in task.items()})
    last = dict(task) | {"model.layers.1.self_attn.k_proj": GramDiagonal.of(task["model.layers.1.self_attn.k_proj"])}
    few = {name: one for name, one in task.items() if "k_proj" not in name}
    with pytest.raises(ValueError, match="q_proj: expected a Gram of 32 features in earlier, got 5"):
        callback(base, earlier=narrow).before_task(lora(copy.deepcopy(base)))
    for safety, error, message in (
        (narrow, ValueError, "q_proj: expected a Gram of 32 features in safety, got 5"),
        (empty, ValueError, "q_proj: its Gram in safety has counted no tokens"),
        (last, TypeError, r"layers\.1\.self_attn\.k_proj: safety: a GramDiagonal"),
        (few, ValueError, r"safety: no Gram of model\.layers\.0\.self_attn\.k_proj, which is trained"),
    ):
        harmonizing = HarmonizeCallback(safety, tiny_models.batches(base, seed=6), CONFIG, progress=False)
        with pytest.raises(error, match=message):
            harmonizing.before_task(lora(copy.deepcopy(base)))
        with pytest.raises(RuntimeError, match="before_task was not called"):
            harmonizing.after_task(base)


def test_tasks_that_train_other_linears(tmp_path):
    """The sum goes on for the linears that an earlier task trained, and one of all linears serves any task."""
    base = tiny_models.llama()
    harmonizing = callback(base)
    for targets in (["q_proj", "down_proj"], ["q_proj"]):
        trainer(lora_on(copy.deepcopy(base), *targets), tmp_path, [harmonizing], save_strategy="no").train()
    assert len(harmonizing.reports) == 2 and len(harmonizing.reports[1].layers) == 3
    down = "model.layers.0.mlp.down_proj"
    tokens = grams(base, 6)[down].token_count
    assert len(harmonizing.earlier) == 6 and harmonizing.earlier[down].token_count == 2 * tokens
    everything = GramCollection(grams(base, 7))
    later = callback(base, earlier=GramCollection({**everything, "vision.q_proj": everything[down]}))
    trainer(lora_on(copy.deepcopy(base), "q_proj"), tmp_path, [later], save_strategy="no").train()
    assert list(later.reports[0].layers) == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert all(layer.earlier_count == 1 for layer in later.reports[0].layers.values())
    assert set(later.earlier) == set(everything), "what the decoder does not have is left out"
    with pytest.raises(ValueError, match=r"earlier: no Gram of model\.layers\.0\.self_attn\.k_proj, which is trained"):
        harmonizing.before_task(lora_on(copy.deepcopy(base), "k_proj"))


def test_resuming_asks_for_the_earlier_tasks(tmp_path):
    """They are not in a checkpoint, and without them the task would be harmonized as if it were the first."""
    base = tiny_models.llama()
    first = callback(base)
    trainer(lora(copy.deepcopy(base)), tmp_path / "first", [first], save_strategy="no").train()
    first.save_earlier(tmp_path / "earlier.safetensors")
    adapted = lora(copy.deepcopy(base))
    straight, began = callback(base, earlier=tmp_path / "earlier.safetensors"), copy.deepcopy(adapted)
    trainer(adapted, tmp_path / "second", [straight], seed=9).train()
    checkpoint = tmp_path / "second" / "checkpoint-2"
    run = trainer(copy.deepcopy(began), tmp_path / "second", [callback(base)], seed=9)
    with pytest.raises(ValueError, match="earlier: the training goes on from a checkpoint of a run that protected"):
        run.train(resume_from_checkpoint=str(checkpoint))
    for more, count in (({"earlier": tmp_path / "earlier.safetensors"}, 1), ({"protect_earlier": False}, 0)):
        resumed = callback(base, **more)
        model = copy.deepcopy(began)
        trainer(model, tmp_path / "second", [resumed], seed=9).train(resume_from_checkpoint=str(checkpoint))
        assert {layer.earlier_count for layer in resumed.reports[0].layers.values()} == {count}
        if count:
            tiny_models.assert_unchanged(model, tiny_models.snapshot(adapted))
            assert resumed.reports[0].to_dict() == straight.reports[0].to_dict()


def test_evaluation_beside_it(tmp_path):
    """Only the end of a training is the end of a task, and the model is left in the mode in which it was."""
    base = tiny_models.llama()
    adapted, harmonizing = lora(copy.deepcopy(base)), callback(base)
    run = trainer(adapted, tmp_path, [harmonizing], save_strategy="no")
    run.args.eval_strategy, run.args.eval_steps, run.eval_dataset = "steps", 2, run.train_dataset
    run.train()
    assert len(harmonizing.reports) == 1
    after = tiny_models.snapshot(adapted)
    run.evaluate()
    run.predict(run.train_dataset)
    tiny_models.assert_unchanged(adapted, after)
    assert len(harmonizing.reports) == 1
    for mode in (True, False):
        adapted.train(mode)
        harmonizing.before_task(adapted)
        assert adapted.training == mode
        harmonizing.after_task(adapted)
        assert adapted.training == mode
