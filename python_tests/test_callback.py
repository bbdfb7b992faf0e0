"""HarmonizeCallback: HPA inside transformers' Trainer, and by hand in a loop of one's own."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from trainer_models import trainer

from hpa_ext import HPAConfig, calibrate, harmonize_model
from hpa_ext.training.callback import STATE_KEY, HarmonizeCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TARGETS = ["q_proj", "down_proj"]


def lora(model):
    """As a user makes it: B is zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.2))


def grams(model, seed):
    return calibrate(model, tiny_models.batches(model, seed=seed), progress=False)


def callback(model, **options):
    def safety():
        torch.rand(3)  # as a DataLoader that shuffles draws
        return tiny_models.batches(model, seed=5)

    return HarmonizeCallback(safety, tiny_models.batches(model, seed=6), progress=False, **options)


def expected_after(old, trained):
    """What the callback stands for, step by step: both models at hand."""
    old = copy.deepcopy(old)
    safety, task = grams(old, 5), grams(trained, 6)
    report = harmonize_model(old, trained, safety, task, progress=False)
    return trained, report


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("prepare", [lambda model: model, lora], ids=["full", "lora"])
def test_trainer_with_the_callback_equals_harmonizing_afterwards(kind, prepare, tmp_path, caplog):
    old = getattr(tiny_models, kind)()
    plain = prepare(copy.deepcopy(old))
    trainer(plain, tmp_path / "plain").train()
    trained = copy.deepcopy(plain)
    expected, report = expected_after(old, plain)
    model = prepare(copy.deepcopy(old))
    harmonizing = callback(old)
    run = trainer(model, tmp_path / "harmonized", [harmonizing])
    run.train()
    # The samples were drawn in the same order: the callback leaves the run's random numbers alone.
    tiny_models.assert_unchanged(model, tiny_models.snapshot(expected))
    assert any(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    (ours,) = harmonizing.reports
    names = [name for name in report.layers if prepare is not lora or name.split(".")[-1] in TARGETS]
    assert list(ours.layers) == names
    for name in names:
        assert torch.equal(ours[name].retained, report[name].retained)
    logged = run.state.log_history[-1]
    assert logged["hpa_layers"] == len(names) and logged["step"] == 4
    assert 0 < logged["hpa_retained_percent"] < 20
    # An adapter that is saved now has lost the step; what is merged has not.
    assert ("merge_and_unload" in caplog.text) == (prepare is lora)
    saved = model.merge_and_unload() if prepare is lora else model
    saved.save_pretrained(tmp_path / "saved")
    again = type(old).from_pretrained(tmp_path / "saved")
    batch = tiny_models.batches(old)[0]
    assert torch.allclose(tiny_models.logits(again, batch), tiny_models.logits(model, batch), atol=1e-6)


def test_what_is_remembered():
    base = tiny_models.llama()
    harmonizing = callback(base)
    adapted = lora(copy.deepcopy(base))
    harmonizing.before_task(adapted)
    assert harmonizing._task.old is None, "the base weights of LoRA stay what they are"
    assert {name.split(".")[-1] for name in harmonizing._task.names} == set(TARGETS)
    harmonizing.before_task(copy.deepcopy(base))
    full = harmonizing._task.old
    assert len(full) == 21 and full.nbytes == sum(p.nbytes for p in base.model.layers.parameters() if p.dim() == 2)
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.model.layers[1].mlp.up_proj.requires_grad_(True)
    harmonizing.before_task(frozen)
    assert list(harmonizing._task.old.linears) == ["model.layers.1.mlp.up_proj"]


def test_an_adapter_that_is_not_zero_when_the_task_begins():
    """The second task on one adapter: the old weights are base plus adapter, of which copies are kept."""
    base = tiny_models.llama()
    adapted = tiny_models.with_lora(base, TARGETS)
    old = copy.deepcopy(adapted).merge_and_unload()
    harmonizing = callback(base)
    harmonizing.before_task(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.03 * torch.randn(parameter.shape)
    trained = copy.deepcopy(adapted)
    report = harmonizing.after_task(adapted)
    expected, _ = expected_after(old, trained)
    for name in report.layers:
        ours = adapted.get_base_model().get_submodule(name).base_layer.weight
        torch.testing.assert_close(
            ours, expected.get_base_model().get_submodule(name).base_layer.weight, rtol=0, atol=1e-6
        )


def test_trained_copies_count():
    from peft import LoraConfig, get_peft_model

    base = tiny_models.llama()
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    )
    harmonizing = callback(base)
    harmonizing.before_task(adapted)
    assert harmonizing._task.old is None and len(harmonizing._task.names) == 6
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    trained = copy.deepcopy(adapted)
    report = harmonizing.after_task(adapted)
    expected, told = expected_after(base, trained)
    for name in report.layers:
        assert torch.equal(report[name].retained, told[name].retained)
    batch = tiny_models.batches(base)[0]
    assert torch.equal(tiny_models.logits(adapted, batch), tiny_models.logits(expected, batch))


def test_several_passes_make_the_same_grams():
    base = tiny_models.llama()
    one, three = callback(base), callback(base, passes=3)
    for harmonizing in (one, three):
        harmonizing.before_task(base)
    assert list(one._task.safety) == list(three._task.safety)
    for name, gram in one._task.safety.items():
        assert torch.equal(gram.sum_inverse, three._task.safety[name].sum_inverse)


def test_safety_grams_made_beforehand_and_modules(tmp_path):
    base = tiny_models.llama()
    safety = grams(base, 5)
    harmonizing = HarmonizeCallback(
        safety,
        lambda: iter(tiny_models.batches(base, seed=6)),
        HPAConfig(retain_max=30.0),
        modules=r".*\.1\..*",
        progress=False,
    )
    trainer(copy.deepcopy(base), tmp_path, [harmonizing]).train()
    (report,) = harmonizing.reports
    assert len(report) == 7 and report.config.retain_max == 30.0
    with pytest.raises(ValueError, match=r"safety: no Gram of model\.layers\.2\.mlp\.down_proj, which is trained"):
        HarmonizeCallback(
            {k: v for k, v in safety.items() if k != "model.layers.2.mlp.down_proj"}, tiny_models.batches(base)
        ).before_task(base)


def test_the_trainers_log_gets_the_summary(tmp_path):
    base = tiny_models.llama()
    harmonizing = callback(base)
    run = trainer(base, tmp_path, [harmonizing])
    harmonizing.trainer = run
    run.train()
    assert run.state.log_history[-1]["hpa_layers"] == 21 and "epoch" in run.state.log_history[-1]


@pytest.mark.parametrize("prepare", [lambda model: model, lora], ids=["full", "lora"])
def test_resuming_from_a_checkpoint(prepare, tmp_path):
    old = tiny_models.llama()
    whole = prepare(copy.deepcopy(old))
    first = callback(old)
    trainer(whole, tmp_path, [first]).train()
    checkpoint = tmp_path / "checkpoint-2"
    is_full = prepare is not lora
    if is_full:
        with pytest.raises(ValueError, match=r"model_old: the training goes on from a checkpoint"):
            trainer(prepare(copy.deepcopy(old)), tmp_path, [callback(old)]).train(
                resume_from_checkpoint=str(checkpoint)
            )
    resumed = prepare(copy.deepcopy(old))
    second = callback(old, **({"model_old": copy.deepcopy(old)} if is_full else {}))
    trainer(resumed, tmp_path, [second]).train(resume_from_checkpoint=str(checkpoint))
    assert (second.reports[0].layers.keys()) == (first.reports[0].layers.keys())
    for name, layer in first.reports[0].layers.items():
        assert torch.equal(second.reports[0][name].retained, layer.retained)
    # Restored optimizer states and random numbers repeat the run, up to the sums' order in a few places.
    for ours, expected in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_resuming_lora_of_a_checkpoint_that_does_not_know(tmp_path):
    """Written without the callback: whether the adapter began at zero cannot be known."""
    import json

    old = tiny_models.llama()
    trainer(lora(copy.deepcopy(old)), tmp_path, [callback(old)]).train()
    checkpoint = tmp_path / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"].pop(STATE_KEY)["attributes"] == {"adapters_were_zero": True}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="model_old: the training goes on from a checkpoint"):
        trainer(lora(copy.deepcopy(old)), tmp_path, [callback(old)]).train(resume_from_checkpoint=str(checkpoint))


def test_a_training_that_starts_again_keeps_the_first_weights(tmp_path):
    """The Trainer starts again with half the batch when memory runs out, and the weights may have moved."""
    base = tiny_models.llama()
    harmonizing = callback(base)
    run = trainer(base, tmp_path, [harmonizing])
    harmonizing.on_train_begin(run.args, run.state, run.control, model=base)
    first = harmonizing._task
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight += 1
    harmonizing.on_train_begin(run.args, run.state, run.control, model=base)
    assert harmonizing._task is first
    harmonizing.on_train_begin(run.args, run.state, run.control, model=copy.deepcopy(base))
    assert harmonizing._task is not first, "another model is another task"


def test_two_tasks_in_a_row(tmp_path):
    base = tiny_models.llama()
    harmonizing = callback(base)
    adapted = lora(copy.deepcopy(base))
    for task in ("first", "second"):
        before = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
        trainer(adapted, tmp_path / task, [harmonizing]).train()
        after = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
        retained = harmonizing.reports[-1]["model.layers.0.self_attn.q_proj"].retained
        assert torch.equal(after[:, retained], before[:, retained]) and not torch.equal(after, before)
    assert len(harmonizing.reports) == 2


def test_wrong_arguments():
    base = tiny_models.llama()
    batches = tiny_models.batches(base)
    for arguments, options, error, message in (
        ((iter(batches), batches), {}, TypeError, "safety: expected batches that can be gone through again"),
        ((batches, 3), {}, TypeError, "task: expected an iterable of batches or a function, got int"),
        ((batches, batches, {"alpha_max": 1}), {}, TypeError, "config: expected an HPAConfig or a .*, got dict"),
        ((batches, batches), {"passes": 0}, ValueError, "passes: expected an int of at least 1, got 0"),
        ((batches, batches), {"model_old": "path"}, TypeError, "model_old: expected an nn.Module, got str"),
    ):
        with pytest.raises(error, match=message):
            HarmonizeCallback(*arguments, **options)
    with pytest.raises(RuntimeError, match="before_task was not called"):
        callback(base).after_task(base)
    with pytest.raises(ValueError, match="none of the 21 linears that are covered is trained"):
        callback(base).before_task(copy.deepcopy(base).requires_grad_(False))
    dora = tiny_models.with_lora(base, TARGETS, use_dora=True)
    with pytest.raises(ValueError, match="adapter 'default' is a LoRA variant"):
        callback(base).before_task(dora)


def test_zero_3_is_refused_by_name():
    base = tiny_models.llama()
    base.model.layers[0].mlp.up_proj.weight.ds_id = 7  # what DeepSpeed marks the parameters with that it partitions
    with pytest.raises(
        ValueError, match=r"model: model\.layers\.0\.mlp\.up_proj\.weight is partitioned by DeepSpeed ZeRO-3"
    ):
        callback(base).before_task(base)
    with pytest.raises(ValueError, match=r"model_new: .* ZeRO-3, .* use FSDP2"):
        harmonize_model(tiny_models.llama(), base, {}, {}, progress=False)


def test_the_embedded_llava(tmp_path):
    """The model that ships, LoRA on its language model, two steps."""
    from hpa_ext.models.embedded import load_embedded
    from hpa_ext.training.lora import add_lora

    model, _ = load_embedded()
    adapted = add_lora(model, rank=4)
    batches = _embedded_batches()
    harmonizing = HarmonizeCallback(batches, batches, progress=False)
    harmonizing.before_task(adapted)
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = harmonizing.after_task(adapted)
    assert len(report) == 28


def _embedded_batches():
    from hpa_ext.models.embedded import load_embedded

    model, _ = load_embedded()
    image = model.config.image_token_id
    ids = torch.randint(10, 40, (4, 40))
    ids[:, 2:18] = image
    return [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "pixel_values": torch.randn(4, 3, 32, 32),
        }
    ]
