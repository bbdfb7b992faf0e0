"""Training experts, and training on from a HiDe model: gradients, schedule, anchors gathered meanwhile."""

from __future__ import annotations

import functools
import warnings

import hide_models as hm
import pytest
import torch
from helpers import refuses
from peft import LoraConfig, get_peft_model

from hpa_ext.hide import Anchors, own_features
from hpa_ext.hide.anchor_collection import AnchorCollector, collect_anchors
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.layers import RoutedLinear
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.training.hide_expert import ANCHORS_FILE, ExpertSchedule, save_expert, train_expert
from hpa_ext.training.lora import LANGUAGE_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_gradients_of_a_routed_layer_are_those_of_the_sum():
    torch.manual_seed(0)
    state = RoutingState(lambda prompt, images: None)
    base = torch.nn.Linear(5, 4, bias=False, dtype=torch.float64)
    gains = 0.1 * torch.randn(3, 5, dtype=torch.float64)
    layer = RoutedLinear(
        base, torch.randn(3, 2, 5).double(), torch.randn(3, 4, 2).double(), [0.5, 1.0, 2.0], state, gains
    )
    weights = torch.softmax(torch.randn(2, 3, dtype=torch.float64), 1)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        with state.fixed(weights):
            return torch.func.functional_call(layer, {"a": a, "b": b}, (x,))

    a, b = (value.detach().requires_grad_() for value in (layer.a, layer.b))
    assert torch.autograd.gradcheck(run, (x, a, b))
    scaling = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rows = []
    for s in range(2):
        weight = base.weight * (1 + weights[s] @ gains)
        weight = weight + torch.einsum("c,cor,cri->oi", weights[s] * scaling, b, a)
        rows.append(x[s] @ weight.mT)
    expected = torch.stack(rows)
    torch.testing.assert_close(run(x, a, b), expected)


def test_training_goes_on_from_a_hide_model():
    model = hm.hide(expert_dtype=torch.float32)
    batch = hm.prompts()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == hm.IMAGE_TOKEN, 5)
    labels[:, :-4] = -100
    parameters = model.train_experts()
    assert len(parameters) == 14
    before = {update: expert.updates for update, expert in zip(model.tasks, model.experts, strict=True)}
    fused = hm.state_of(model.model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    trained = {name for name, value in model.model.state_dict().items() if not torch.equal(value, fused[name])}
    assert trained
    assert all(".layers.2." in name and name.endswith((".a", ".b")) for name in trained)
    top = "model.language_model.layers.2.mlp.up_proj"
    after = dict(zip(model.tasks, model.experts, strict=True))
    assert not torch.equal(after["alpha"].updates[top].b, before["alpha"][top].b)
    assert (
        after["alpha"].updates["model.language_model.layers.0.mlp.up_proj"]
        is before["alpha"]["model.language_model.layers.0.mlp.up_proj"]
    )
    expected = model(**batch).logits
    model.configure(model.config.replace(temperature=0.2))
    model.configure(model.config.replace(temperature=0.1))
    assert torch.equal(model(**batch).logits, expected)
    assert model.train_experts(False)[0].requires_grad is False


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    model = hm.hide(expert_dtype=torch.float32)
    batch = hm.prompts()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == hm.IMAGE_TOKEN, 5)
    labels[:, :-4] = -100
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.model.enable_input_require_grads()
        parameters = model.train_experts()
        model.train()
        model(**batch, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
        model.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(checkpointed, plain)


def test_anchors_gathered_while_training_are_those_of_the_data(tmp_path):
    from hpa_ext.data.collate import collate_training
    from hpa_ext.data.toy_tasks import draw_task
    from hpa_ext.models.embedded import load_embedded

    model, processor = load_embedded()
    features = own_features(model, processor.tokenizer)
    samples = draw_task("compass", 20, 0)
    batches = [collate_training(processor, samples[i : i + 7]) for i in range(0, 20, 7)]
    collected = collect_anchors(model, "compass", batches, features, progress=False)
    anchors = Anchors(features.describe())
    schedule = ExpertSchedule(batch_size=8, max_steps=5, learning_rate=1e-3, projector_learning_rate=1e-4)
    collate = functools.partial(collate_training, processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = train_expert(model, "compass", samples, collate, schedule, anchors, features)
    # Five steps of eight are more than an epoch; each sample counts once.
    assert anchors.count("compass", "image") == anchors.count("compass", "text") == 20
    for modality in ("image", "text"):
        torch.testing.assert_close(
            anchors.mean("compass", modality), collected.mean("compass", modality), rtol=1e-5, atol=1e-6
        )
    assert len(trained.log.losses) == 5
    assert trained.log.losses[-1] < trained.log.losses[0]
    save_expert(trained, tmp_path / "compass", anchors)
    assert (tmp_path / "compass" / ANCHORS_FILE).is_file()
    base, _ = load_embedded()
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    expert = read_expert("compass", tmp_path / "compass", base)
    assert len(expert.updates) == 28
    moved = [name for name, value in expert.projector.items() if not torch.equal(value, before[name])]
    assert len(moved) == len(expert.projector) == 4


def test_the_authors_schedule():
    schedule = ExpertSchedule()
    assert (schedule.rank, schedule.alpha / schedule.rank) == (8, 2.0)
    assert (schedule.learning_rate, schedule.projector_learning_rate, schedule.batch_size) == (2e-4, 2e-5, 24)
    steps = schedule.steps(40_000)
    assert steps == 1667
    rates = [schedule.rate(step, steps) for step in range(steps)]
    assert rates.index(max(rates)) == 51  # 3 % of the steps
    assert rates[0] < 0.02 + 1 / 51
    assert rates[-1] < 1e-3
    assert rates[51:] == sorted(rates[51:], reverse=True)
    for name, value in (("rank", 0), ("max_steps", 0), ("learning_rate", 0.0), ("warmup_ratio", 2.0)):
        with pytest.raises(ValueError, match=name):
            ExpertSchedule(**{name: value})


def test_two_rates_for_lora_and_projector():
    from hpa_ext.training.hide_expert import _groups

    base = hm.llava_of()
    config = LoraConfig(r=2, target_modules=LANGUAGE_LINEARS, modules_to_save=["multi_modal_projector"])
    lora, projector = _groups(get_peft_model(base, config), ExpertSchedule())
    assert (lora["lr"], len(lora["params"])) == (2e-4, 42)
    assert (projector["lr"], len(projector["params"])) == (2e-5, 4)


def test_collectors_leave_no_hooks_and_can_be_paused():
    base = hm.llava_of()
    anchors = Anchors()
    with AnchorCollector(base, anchors, "a", own_features(base)).listening() as collector:
        base(**hm.prompts((1, 0)[:2], (4, 5)))
        collector.enabled = False
        base(**hm.prompts((1, 1), (4, 5)))
    base(**hm.prompts((1, 1), (4, 5)))
    assert (anchors.count("a", "image"), anchors.count("a", "text")) == (1, 2)
    two = Anchors()
    batch = hm.prompts((2,), (4,))
    collect_anchors(base, "a", [batch], own_features(base), two, progress=False)
    pooled = own_features(base).image(base.model.vision_tower(batch["pixel_values"]))
    assert two.count("a", "image") == 1  # a sample with two images counts once, with their mean
    torch.testing.assert_close(two.mean("a", "image").float(), pooled.mean(0))
    with refuses(ValueError, "batches"):
        collect_anchors(base, "a", [], own_features(base))


def test_transformers_trainer_trains_the_routed_experts(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = hm.hide(expert_dtype=torch.float32)
    model.train_experts()
    batch = hm.prompts((0,) * 4)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    rows = [dict(zip((*batch, "labels"), row, strict=True)) for row in zip(*batch.values(), labels, strict=True)]
    name = "model.language_model.layers.2.mlp.up_proj"
    before = [expert.updates[name].b for expert in model.experts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model=model.model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(expert.updates[name].b, old) for expert, old in zip(model.experts, before, strict=True))


def test_training_without_labels_and_saving_over_something_are_refused(tmp_path):
    with pytest.raises(ValueError, match="collate: expected inputs with labels, got input_ids"):
        train_expert(hm.llava_of(), "a", [0, 1], lambda rows: {"input_ids": torch.tensor([[3, 4]] * len(rows))})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with refuses(ValueError, "directory"):
        save_expert(None, tmp_path / "a")
