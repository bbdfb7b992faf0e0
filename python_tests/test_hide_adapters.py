"""Experts from PEFT: directories, PeftModels, state dicts; what is refused; files; export; training."""

from __future__ import annotations

import functools
import json
import warnings

import hide_models as hm
import pytest
import torch
from helpers import refuses
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import with_lora

from hpa_ext import NumericalError
from hpa_ext.hide import Anchors, HiDeConfig, HiDeModel, own_features
from hpa_ext.hide.anchor_collection import AnchorCollector, collect_anchors
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.export import export_adapter, fused_expert
from hpa_ext.hide.layers import RoutedLinear
from hpa_ext.hide.persistence import load_parts
from hpa_ext.hide.routing_state import RoutingState
from hpa_ext.training.hide_expert import ANCHORS_FILE, ExpertSchedule, save_expert, train_expert
from hpa_ext.training.lora import LANGUAGE_LINEARS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def peft_models(base, tasks=hm.TASKS, **options):
    """One PeftModel for each task, projector included."""
    options = {"modules_to_save": ["multi_modal_projector"], **options}
    models = {}
    for number, task in enumerate(tasks):
        model = with_lora(base, LANGUAGE_LINEARS, seed=20 + number, **options)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        models[task] = model
    return models


def same_expert(first, second):
    assert set(first.updates) == set(second.updates)
    for name, update in first.updates.items():
        other = second.updates[name]
        assert torch.equal(update.a, other.a)
        assert torch.equal(update.b, other.b)
        assert update.scaling == other.scaling
    assert set(first.projector) == set(second.projector)
    assert all(torch.equal(value, second.projector[name]) for name, value in first.projector.items())


def test_every_form_of_an_adapter_gives_the_same_expert(tmp_path):
    base = hm.llava_of()
    model = peft_models(base)["alpha"]
    model.save_pretrained(tmp_path / "alpha")
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    expert = read_expert("alpha", model, base)
    assert len(expert.updates) == 21
    assert len(expert.projector) == 4
    assert next(iter(expert.updates.values())).scaling == 2.0
    for source in (tmp_path / "alpha", str(tmp_path / "alpha"), (state, 2.0), (model, "default"), expert):
        same_expert(read_expert("alpha", source, base), expert)


def test_each_expert_alone_is_peft_s_own_model(tmp_path):
    """Expand all, projectors routed, one task: the base with that task's adapter as PEFT runs it."""
    base = hm.llava_of()
    models = peft_models(base, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5})
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    config = HiDeConfig(top_layers=3, projector="routed")
    hide = HiDeModel(base, {task: tmp_path / task for task in models}, hm.anchors_of(base), config)
    batch = hm.prompts()
    for task, model in models.items():
        with torch.no_grad():
            expected = model(**batch).logits
        with hide.routed(task):
            torch.testing.assert_close(hide(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    merged = hide.merge_and_unload("beta")
    torch.testing.assert_close(merged(**batch).logits, models["beta"](**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_peft_model_with_all_adapters(tmp_path):
    base = hm.llava_of()
    models = peft_models(base, modules_to_save=None)
    for task, model in models.items():
        model.save_pretrained(tmp_path / task)
    together = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "alpha", adapter_name="alpha")
    together.load_adapter(tmp_path / "beta", adapter_name="beta")
    anchors = hm.anchors_of(base, ("alpha", "beta"))
    one = HiDeModel(hm.llava_of(), together, anchors)
    other = HiDeModel(hm.llava_of(), [tmp_path / "alpha", tmp_path / "beta"], anchors)
    batch = hm.prompts()
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    with refuses(ValueError, "adapters"):
        HiDeModel(hm.llava_of(), [tmp_path / "alpha"], anchors)
    with refuses(ValueError, "adapters['x']"):
        read_expert("x", together, base)
    with refuses(ValueError, "adapters['x']"):
        read_expert("x", (together, "gamma"), base)


def test_the_order_is_that_of_the_anchors():
    base = hm.llava_of()
    found = hm.experts(base)
    anchors = hm.anchors_of(base).select(["gamma", "alpha", "beta"])
    model = HiDeModel(base, found, anchors)
    assert model.tasks == ["gamma", "alpha", "beta"]
    batch = hm.prompts()
    ours = hm.hide()
    torch.testing.assert_close(model.routing(**batch), ours.routing(**batch)[:, [2, 0, 1]])
    torch.testing.assert_close(model(**batch).logits, ours(**batch).logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_lora_or_does_not_fit_is_refused(tmp_path):
    base = hm.llava_of()
    dora = with_lora(base, LANGUAGE_LINEARS, use_dora=True)
    with pytest.raises(ValueError, match="LoRA variant"):
        read_expert("a", dora, base)
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        read_expert("a", tmp_path / "dora", base)
    biased = with_lora(base, LANGUAGE_LINEARS, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias"):
        read_expert("a", biased, base)
    biased.save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="lora_bias"):
        read_expert("a", tmp_path / "biased", base)
    tower = with_lora(base, r".*vision_tower.*(q|k)_proj")
    with pytest.raises(ValueError, match=r"vision_tower.*expected linears of the language model's decoder"):
        read_expert("a", tower, base)
    head = with_lora(base, LANGUAGE_LINEARS, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*expected parameters of the projector"):
        read_expert("a", head, base)
    merged = with_lora(base, LANGUAGE_LINEARS)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        read_expert("a", merged, base)
    with refuses(TypeError, "adapters['a']"):
        read_expert("a", 3, base)
    with pytest.raises(OSError, match="none"):
        read_expert("a", tmp_path / "none", base)
    with pytest.raises(ValueError, match="fits nowhere"):
        read_expert("a", ({"base_model.model.nowhere.lora_A.weight": torch.ones(1, 1)}, 1.0), base)
    name = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="lora_A alone"):
        read_expert("a", ({f"base_model.model.{name}.lora_A.weight": torch.ones(1, 32)}, 1.0), base)
    with pytest.raises(ValueError, match=r"B: expected \[32, 2\], got \[31, 2\]"):
        read_expert("a", Expert("a", {name: ExpertUpdate(torch.ones(2, 32), torch.ones(31, 2), 1.0)}), base)
    with pytest.raises(NumericalError, match="A of task 'a' holds NaN"):
        read_expert(
            "a", Expert("a", {name: ExpertUpdate(torch.full((2, 32), torch.nan), torch.ones(32, 2), 1.0)}), base
        )
    with pytest.raises(ValueError, match="expected LoRA updates, got none"):
        read_expert("a", Expert("a", {}), base)


def test_anchors_must_be_of_the_adapters_and_of_the_model_s_features():
    base = hm.llava_of()
    found = hm.experts(base)
    state = hm.state_of(base)
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found, hm.anchors_of(base, ("alpha", "beta")))
    with refuses(ValueError, "adapters"):
        HiDeModel(base, {"alpha": found["alpha"]}, hm.anchors_of(base))
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found)
    other = hm.anchors_of(base)
    other.features = {"image": "projected", "text": "clip, pooled"}
    with refuses(ValueError, "anchors"):
        HiDeModel(base, found, other)
    with refuses(TypeError, "config"):
        HiDeModel(base, found, hm.anchors_of(base), {"top_layers": 1})
    hm.assert_same_state(base, state)
    assert HiDeModel(base, found, config=HiDeConfig(top_layers=0)).anchors is None


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
    same_expert(read_expert("beta", tmp_path / "beta", hm.llava_of()), model.experts[1])

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
    same_expert(read_expert("a", tmp_path / "a", base), uneven)
    batch = hm.prompts()
    loaded = PeftModel.from_pretrained(hm.llava_of(), tmp_path / "a").eval()
    model = HiDeModel(base, {"a": uneven}, hm.anchors_of(base, ("a",)))
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


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
