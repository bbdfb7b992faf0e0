"""Methods that change the tuning: their penalties by hand, what they freeze, and what they leave of plain tuning."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from hpa_ext.baselines import METHODS, StepContext, TrainingMethod
from hpa_ext.baselines.ewc import EWC, ewc, fisher_diagonal
from hpa_ext.baselines.l2p import L2P
from hpa_ext.baselines.lwf import lwf
from hpa_ext.baselines.moelora import MixtureLinear, MoELoRA
from hpa_ext.baselines.olora import OLoRA
from hpa_ext.baselines.reglora import RegLoRA
from hpa_ext.baselines.sppft import SPPFT, safety_layers
from hpa_ext.baselines.tuning_step import lora_factors
from hpa_ext.continual.encoding import encode, prompt_batch, training_batch
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.models.embedded import EmbeddedConfig, build
from hpa_ext.training.loop import TrainingSettings, train
from hpa_ext.training.plugin import TrainingPlugin


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    from hpa_ext.data.toy_tasks import vocabulary

    return tuple(vocabulary())


def _model() -> tuple[nn.Module, object]:
    sizes = EmbeddedConfig(text_width=32, text_mlp_width=48, text_layers=3, text_heads=2, vision_width=16)
    model, processor = build(_vocabulary(), sizes)
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False), processor


@pytest.fixture(scope="module")
def samples() -> list:
    return encode(*_model(), draw_task("compass", 12, 1))


def _step(samples: list, number: int = 0) -> StepContext:
    return StepContext(number, seed=number, rank=4, alpha=8.0, samples=samples, collate=training_batch)


def _tune(method: TrainingMethod, model: nn.Module, step: StepContext, steps: int = 3) -> tuple[nn.Module, list[float]]:
    tuned = method.attach(model, step)
    settings = TrainingSettings(steps=steps, batch_size=4, learning_rate=5e-3, warmup_steps=0, seed=step.seed)
    log = train(tuned, step.samples, training_batch, settings, plugins=[method])
    return tuned, log.losses


def _language_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "language_model" in name}


def _two_steps(method: TrainingMethod, samples: list) -> dict[str, Tensor]:
    model, _ = _model()
    for number in range(2):
        step = _step(samples, number)
        tuned, _ = _tune(method, model, step)
        model = method.finish(tuned, step)
    return _language_weights(model)


@pytest.fixture(scope="module")
def plain(samples) -> dict[str, Tensor]:
    return _two_steps(TrainingMethod(), samples)


@pytest.mark.parametrize(
    ("method", "strong"),
    [
        (OLoRA(0.0, "code"), OLoRA(0.5, "code")),
        (EWC(0.0, 4), EWC(1e6, 4)),
        (RegLoRA(0.0, 0.02), RegLoRA(1e5, 0.02)),
        (lwf(strength=0.0), lwf(strength=5.0)),
    ],
)
def test_without_strength_it_is_plain_tuning_and_with_it_is_not(method, strong, samples, plain) -> None:
    weak, changed = _two_steps(method, samples), _two_steps(strong, samples)
    for name, value in plain.items():
        torch.testing.assert_close(weak[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(changed[name], value, atol=1e-4) for name, value in plain.items())


@pytest.mark.parametrize("form", ["code", "paper"])
def test_olora_penalises_the_overlap_with_earlier_a(form: str, samples) -> None:
    method, (model, _) = OLoRA(0.3, form), _model()
    first = method.attach(model, _step(samples))
    assert method.penalty(first, {}, None) is None
    earlier = {name: factors.a.detach().clone() for name, factors in lora_factors(first)}
    second = method.attach(method.finish(first, _step(samples)), _step(samples, 1))
    expected = 0.0
    for name, factors in lora_factors(second):
        for row in earlier[name]:
            for other in factors.a.detach():
                product = float(row @ other)
                expected += abs(product) if form == "code" else product**2
    assert float(method.penalty(second, {}, None).detach()) == pytest.approx(0.3 * expected, rel=1e-4)


def test_ewc_penalises_by_the_fisher_of_single_samples(samples) -> None:
    model, _ = _model()
    name = "model.language_model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    fisher = fisher_diagonal(model, {name: weight}, _step(samples), 3)[name]
    expected = torch.zeros_like(weight)
    weight.requires_grad_(True)
    for sample in samples[:3]:
        (gradient,) = torch.autograd.grad(model(**training_batch([sample])).loss, weight)
        expected += gradient**2 / 3
    torch.testing.assert_close(fisher, expected)
    weight.requires_grad_(False)

    method = ewc(strength=7.0, fisher_samples=3)
    tuned = method.attach(model, _step(samples))
    method.fisher = {key: torch.full_like(factors.layer.weight, 2.0) for key, factors in lora_factors(tuned)}
    with torch.no_grad():
        for _, factors in lora_factors(tuned):
            factors.b.fill_(0.1)
    squares = sum(float((2.0 * factors.b @ factors.a).square().sum()) for _, factors in lora_factors(tuned))
    assert float(method.penalty(tuned, {}, None)) == pytest.approx(7.0 * 2.0 * squares, rel=1e-4)


def test_ewc_leaves_the_model_without_gradients(samples) -> None:
    method, (model, _) = EWC(1.0, 2), _model()
    step = _step(samples)
    tuned, _ = _tune(method, model, step, steps=1)
    plain = method.finish(tuned, step)
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert method.state_bytes() > 0


def test_reglora_marks_the_largest_updates_and_penalises_only_there(samples) -> None:
    method, (model, _) = RegLoRA(10.0, 0.25), _model()
    tuned = method.attach(model, _step(samples))
    with torch.no_grad():
        for _, factors in lora_factors(tuned):
            factors.b.normal_()
    updates = {name: factors.update().detach().abs() for name, factors in lora_factors(tuned)}
    plain = method.finish(tuned, _step(samples))
    for name, update in updates.items():
        marked = method.counts[name].bool()
        assert int(marked.sum()) == int(0.25 * update.numel() + 0.5)
        assert float(update[marked].min()) >= float(update[~marked].max())
    again = method.attach(plain, _step(samples, 1))
    assert float(method.penalty(again, {}, None)) == 0.0  # B is zero
    with torch.no_grad():
        for _, factors in lora_factors(again):
            factors.b.fill_(0.3)
    total = sum(float((method.counts[n] * f.update().abs()).sum()) for n, f in lora_factors(again))
    entries = sum(f.update().numel() for _, f in lora_factors(again))
    assert float(method.penalty(again, {}, None)) == pytest.approx(10.0 * total / entries, rel=1e-4)


def test_lwf_is_the_divergence_from_the_old_model(samples) -> None:
    method, (model, _) = lwf(strength=0.5, temperature=2.0), _model()
    batch = training_batch(samples[:3])
    old = model(**batch).logits
    tuned = method.attach(model, _step(samples))
    outputs = tuned(**batch)
    assert float(method.penalty(tuned, batch, outputs)) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for _, factors in lora_factors(tuned):
            factors.b.normal_(0, 0.1)
    outputs = tuned(**batch)
    divergences = []
    for row in range(3):
        for place in range(batch["labels"].shape[1] - 1):
            if batch["labels"][row, place + 1] != -100:
                p, q = ((x[row, place] / 2).softmax(-1) for x in (old, outputs.logits))
                divergences.append(float((p * (p / q).log()).sum()))
    expected = 0.5 * sum(divergences) / len(divergences)
    assert float(method.penalty(tuned, batch, outputs)) == pytest.approx(expected, rel=1e-3)


def test_sppft_leaves_its_block_bit_identical(samples) -> None:
    method, (model, _) = SPPFT(2, 2), _model()
    before = _language_weights(model)
    step = _step(samples)
    tuned, _ = _tune(method, model, step)
    after = _language_weights(method.finish(tuned, step))
    changed = {name.split("layers.")[1][0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0", "2"}


@pytest.mark.parametrize("block", [(0, 1), (3, 2), (1, 3), (2, 4)])
def test_sppft_refuses_a_block_that_leaves_nothing(block, samples) -> None:
    with pytest.raises(ValueError, match="block"):
        SPPFT(*block).attach(_model()[0], _step(samples))


def test_safety_layers_are_where_the_curves_part() -> None:
    assert safety_layers([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.1, 2.0, 2.9, 3.0]) == (2, 3)
    with pytest.raises(ValueError, match="part in no layer"):
        safety_layers([1.0, 1.0], [1.0, 1.0])


def test_a_mixture_is_the_gated_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7)
    mixture = MixtureLinear(base, experts=3, rank=2, scaling=0.5, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(mixture.up)
    nn.init.normal_(mixture.router)
    x = torch.randn(4, 6, 5)
    gates = (x @ mixture.router.mT).softmax(-1)
    expected = base(x)
    for expert in range(3):
        part = slice(2 * expert, 2 * expert + 2)
        expected = expected + 0.5 * gates[..., expert : expert + 1] * (
            x @ mixture.down[part].mT @ mixture.up[:, part].mT
        )
    torch.testing.assert_close(mixture(x), expected)


def test_moelora_changes_nothing_at_first_and_goes_on_with_its_experts(samples) -> None:
    method, (model, _) = MoELoRA(2), _model()
    batch = training_batch(samples[:2])
    before = model(**batch).logits
    step = _step(samples)
    model = method.attach(model, step)
    torch.testing.assert_close(model(**batch).logits, before)
    tuned, losses = _tune(method, model, step, steps=8)
    assert losses[-1] < losses[0]
    assert method.attach(method.finish(tuned, step), _step(samples, 1)) is tuned
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert all(name.endswith((".down", ".up", ".router")) for name in trained)
    with pytest.raises(ValueError, match="experts"):
        MoELoRA(3).attach(_model()[0], step)


def test_l2p_answers_alike_whatever_its_neighbours(samples) -> None:
    method, (model, _) = L2P(pool=4, length=2, top=2, pull=0.1), _model()
    step = _step(samples)
    before = method.attach(model, step).prompts.detach().clone()
    tuned, _ = _tune(method, model, step, steps=4)
    assert not torch.equal(tuned.prompts, before)
    longer = encode(*_model(), draw_task("yesno", 1, 1))
    together = tuned.generate(**prompt_batch([samples[0], *longer]), max_new_tokens=4, do_sample=False)
    alone = tuned.generate(**prompt_batch(samples[:1]), max_new_tokens=4, do_sample=False)
    assert torch.equal(together[0], alone[0])
    outputs = tuned(**training_batch(samples[:1]))
    first = outputs.logits[0, samples[0].prompt_tokens - 1].argmax()
    assert int(first) == int(alone[0, 0])
    assert float(method.penalty(tuned, {}, outputs)) == pytest.approx(-0.1 * float(tuned.cosine))


def test_the_loop_calls_a_plugin_at_every_point(samples) -> None:
    calls: list[str] = []

    class Spy(TrainingPlugin):
        def start(self, model):
            calls.append("start")

        def penalty(self, model, inputs, outputs):
            calls.append("penalty")
            return 1e3 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

        def after_backward(self, model):
            calls.append("backward")
            assert any(p.grad is not None for p in model.parameters())

        def after_step(self, model):
            calls.append("step")
            assert all(p.grad is None for p in model.parameters())

    method, (model, _) = TrainingMethod(), _model()
    tuned = method.attach(model, _step(samples))
    settings = TrainingSettings(steps=2, batch_size=4, warmup_steps=0)
    log = train(tuned, samples, training_batch, settings, plugins=[Spy()])
    assert calls == ["start"] + ["penalty", "backward", "step"] * 2
    assert max(log.losses) < 100  # without the penalty


def test_bfloat16_tunes_float32_parameters(samples) -> None:
    results = {}
    for precision in ("float32", "bfloat16"):
        tuned = TrainingMethod().attach(_model()[0], _step(samples))
        settings = TrainingSettings(steps=6, batch_size=6, learning_rate=5e-3, warmup_steps=0, precision=precision)
        results[precision] = train(tuned, samples, training_batch, settings).losses
        assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    assert results["bfloat16"] != results["float32"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.05)
    with pytest.raises(ValueError, match="precision"):
        TrainingSettings(steps=1, precision="int8")


def test_every_training_method_can_be_made_with_every_value_of_its_grid() -> None:
    for method in METHODS.values():
        if method.kind == "training":
            for value in method.grid or (None,):
                options = {} if value is None else {method.strength: value}
                assert isinstance(method.function(**method.settings, **options), TrainingMethod)
