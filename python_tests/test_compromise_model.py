"""The compromise on transformers models, with and without LoRA; nothing is written when anything is refused."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
import torch.distributed as dist
from torch import nn

from hpa_ext import (
    CompromiseConfig,
    CompromiseReport,
    GramDiagonal,
    HPAConfig,
    ModelReport,
    NumericalError,
    calibrate,
    harmonize,
    harmonize_,
    harmonize_model,
)
from hpa_ext.compromise import solution
from hpa_ext.compromise.factor import factorize

CONFIG = CompromiseConfig(strength=0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava"])
def test_every_linear_of_the_decoder(kind):
    old, new, safety, task = tiny_models.setting(getattr(tiny_models, kind))
    before_old, before = tiny_models.snapshot(old), tiny_models.snapshot(new)
    report = harmonize_model(old, new, safety, task, CONFIG, progress=False)
    assert isinstance(report, CompromiseReport) and list(report.layers) == list(safety)
    for name in report.layers:
        transpose = kind == "gpt2"
        old_w, new_w = (w[f"{name}.weight"].T if transpose else w[f"{name}.weight"] for w in (before_old, before))
        expected = harmonize(old_w, new_w, (safety[name], task[name]), config=CONFIG)
        result = new.state_dict()[f"{name}.weight"]
        assert torch.equal(result.T if transpose else result, expected), name
    for key in before:
        if key.removesuffix(".weight") not in report.layers:
            assert torch.equal(new.state_dict()[key], before[key]), f"{key} is no linear of the decoder"
    tiny_models.assert_unchanged(old, before_old)
    assert len(str(report).splitlines()) == 2 + len(report)


def test_linears_with_one_input_share_a_factor(monkeypatch):
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    made = []
    monkeypatch.setattr(solution, "factorize", lambda *given: made.append(1) or factorize(*given))
    report = harmonize_model(old, new, safety, task, CONFIG, progress=False)
    assert (len(report), len(made)) == (21, 12)  # q k v, o, gate up, down in each of three layers


def test_a_budget_is_held_in_every_linear():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    report = harmonize_model(old, new, safety, task, CompromiseConfig(budget=0.1), progress=False)
    assert all(0.099 <= layer.safety_left <= 0.1 for layer in report.layers.values())


def test_the_config_says_which_method():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    for config, kind in ((None, ModelReport), (HPAConfig(), ModelReport), (CONFIG, CompromiseReport)):
        assert type(harmonize_model(old, copy.deepcopy(new), safety, task, config, progress=False)) is kind
    with pytest.raises(ValueError, match="earlier: HPA has no place"):
        harmonize_model(old, new, safety, task, earlier=[task], progress=False)


def test_earlier_tasks_by_name():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    before = tiny_models.snapshot(new)
    other = calibrate(old, tiny_models.batches(old, seed=9), progress=False)
    report = harmonize_model(old, new, safety, task, CONFIG, earlier=[other], progress=False)
    name = next(iter(report.layers))
    expected = harmonize(
        old.state_dict()[f"{name}.weight"], before[f"{name}.weight"], (safety[name], task[name]), config=CONFIG,
        earlier=[other[name]],
    )  # fmt: skip
    assert torch.equal(new.state_dict()[f"{name}.weight"], expected)
    assert all(layer.earlier_count == 1 for layer in report.layers.values())


def test_a_lora_is_absorbed():
    base = tiny_models.llama()
    model = tiny_models.with_lora(base, ["q_proj", "down_proj"])
    safety = calibrate(base, tiny_models.batches(base), progress=False)
    task = calibrate(model, tiny_models.batches(base, seed=5), progress=False)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = harmonize_model(base, merged, safety, task, CONFIG, modules=r".*(q_proj|down_proj)", progress=False)
    report = harmonize_model(base, model, safety, task, CONFIG, modules=r".*(q_proj|down_proj)", progress=False)
    assert list(report.layers) == list(plain.layers)
    batch = tiny_models.batches(base, 1)[0]
    assert torch.allclose(tiny_models.logits(model, batch), tiny_models.logits(merged, batch), atol=1e-5)
    assert all((p == 0).all() for name, p in model.named_parameters() if "lora_B" in name)


def test_nothing_is_written_when_the_last_layer_is_refused():
    old, new, safety, task = tiny_models.setting(tiny_models.llama)
    last = list(safety)[-1]
    for spoil, error, message in (
        (lambda grams: grams.pop(last), ValueError, f"{last}: no Gram in safety"),
        (lambda grams: grams.update({last: GramDiagonal.of(grams[last])}), TypeError, f"{last}: safety: a GramDiag"),
        (lambda grams: grams.update({last: grams[last].matrix() * 0}), NumericalError, f"{last}: gram.safety: .*zero"),
        (lambda grams: grams.update({last: torch.eye(3)}), ValueError, f"{last}: gram.safety: expected"),
    ):
        grams, before = dict(safety), tiny_models.snapshot(new)
        spoil(grams)
        with pytest.raises(error, match=message):
            harmonize_model(old, new, grams, task, CONFIG, progress=False)
        tiny_models.assert_unchanged(new, before)
    with pytest.raises(ValueError, match=f"{last}: no Gram in earlier"):
        harmonize_model(old, new, safety, task, CONFIG, earlier=[{k: v for k, v in task.items() if k != last}])
    with pytest.raises(TypeError, match="task: expected a mapping"):
        harmonize_model(old, new, safety, [task], CONFIG)
    with torch.no_grad():
        new.get_submodule(last).weight[0, 0] = torch.nan
    before = tiny_models.snapshot(new)
    with pytest.raises(NumericalError, match=f"{last}: layer_new: .*1 NaN") as error:
        harmonize_model(old, new, safety, task, CONFIG, progress=False)
    assert error.value.module == last
    tiny_models.assert_unchanged(new, before)


@pytest.fixture
def mesh():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_that_are_divided_among_processes_are_refused_by_name(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    old, new = (distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]) for _ in range(2))
    pair = torch.eye(4), torch.eye(4)
    for run in (harmonize, harmonize_):
        with pytest.raises(ValueError, match=r"layer_old: the compromise does not take DTensors; .*harmonize_adapter"):
            run(old, new, pair, config=CONFIG)
    models = [nn.Sequential(nn.Linear(4, 6, bias=False)) for _ in range(2)]
    models[1][0].weight = nn.Parameter(new)
    with pytest.raises(ValueError, match="0: model_new: the compromise does not take DTensors"):
        harmonize_model(*models, {"0": pair[0]}, {"0": pair[1]}, CONFIG)
