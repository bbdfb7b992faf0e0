"""HPA on experts: the same as HPA on the weights, fused and routed exactly, read from harmonized adapters."""

from __future__ import annotations

import hide_models as hm
import pytest
import torch
from helpers import refuses
from tiny_models import batches

from hpa_ext import calibrate, harmonize
from hpa_ext.checkpoints.gain_file import GAIN_FILE, GAIN_MARK, gain_bytes, sha256_of
from hpa_ext.hide import HiDeConfig, HiDeModel, harmonize_experts
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert
from hpa_ext.hide.export import export_adapter
from hpa_ext.hide.harmonized import harmonize_expert
from hpa_ext.hide.tensor_files import read_tensors, write_tensors
from hpa_ext.hpa import HPAConfig
from hpa_ext.models.structure import layer_depth


@pytest.fixture(scope="module")
def setting():
    """A base, experts, the safety Grams of the base, and the task Grams of the base with each expert."""
    base = hm.llava_of()
    found = hm.experts(base, scale=0.2)
    safety = calibrate(base, batches(base, seed=5), progress=False)
    tasks = {}
    for task, expert in found.items():
        single = HiDeModel(hm.llava_of(), {task: expert}, config=HiDeConfig(top_layers=0)).merge_and_unload()
        tasks[task] = calibrate(single, batches(base, seed=6), progress=False)
    return base, found, safety, tasks


@pytest.mark.parametrize("config", [HPAConfig(), HPAConfig(orthogonal=False), HPAConfig(retain_min=30, retain_max=60)])
def test_a_harmonized_expert_is_hpa_s_merge(setting, config):
    base, found, safety, tasks = setting
    expert = found["alpha"]
    harmonized, reports = harmonize_expert(base, expert, safety, tasks["alpha"], config, progress=False)
    assert set(harmonized.updates) == set(reports) == set(expert.updates)
    for name, update in harmonized.updates.items():
        weight = base.get_submodule(name).weight.detach().double()
        new = weight + hm.delta(expert.updates[name])
        grams = (safety[name].matrix().double(), tasks["alpha"][name].matrix().double())
        expected = harmonize(weight, new, grams, layer_depth(base, name), config)
        change = 0 if update.gain_change is None else update.gain_change.double()
        merged = weight * (1 + change) + hm.delta(update)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
        retained = reports[name].retained
        assert not update.a[:, retained].any()
        assert (update.gain_change is None) is (not config.orthogonal)
    assert harmonized.projector.keys() == expert.projector.keys()


def test_harmonized_experts_are_fused_and_routed_exactly(setting):
    base, found, safety, tasks = setting
    experts, reports = harmonize_experts(base, list(found.values()), safety, tasks, progress=False)
    assert list(reports) == list(hm.TASKS)
    coefficients = {"alpha": 1.0, "beta": 0.5, "gamma": 0.25}
    model = HiDeModel(
        hm.llava_of(), {expert.task: expert for expert in experts}, hm.anchors_of(base),
        HiDeConfig(fusion_coefficients=coefficients, projector="base"),
    )  # fmt: skip
    batch = hm.prompts()
    weights = model.routing(**batch)
    logits = model(**batch).logits.detach()
    largest = 0.0
    for row in range(4):
        exact = {}
        for name in found["alpha"].updates:
            d = weights[row].tolist() if ".layers.2." in name else list(coefficients.values())
            total = base.get_submodule(name).weight.detach().double()
            changes = [expert.updates[name].gain_change.double() for expert in experts]
            assert any(change.any() for change in changes)
            start = total * (1 + sum(value * change for value, change in zip(d, changes, strict=True)))
            exact[name] = start + sum(
                value * hm.delta(expert.updates[name]) for value, expert in zip(d, experts, strict=True)
            )
            largest = max(largest, float((start - total).abs().max()))
        plain = hm.exact_copy(base, exact)
        alone = hm.row_of(batch, row, (1, 1, 1, 1))
        alone["pixel_values"] = alone["pixel_values"].double()
        torch.testing.assert_close(logits[row, -1].double(), plain(**alone).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert largest > 1e-3  # the gains are no rounding error


def test_a_saved_model_keeps_the_gains(setting, tmp_path):
    base, found, safety, tasks = setting
    experts, _ = harmonize_experts(base, list(found.values()), safety, tasks, progress=False)
    model = HiDeModel(hm.llava_of(), {expert.task: expert for expert in experts}, hm.anchors_of(base))
    again = HiDeModel.load(model.save(tmp_path / "hide"), hm.llava_of())
    hm.assert_same_state(again.model, hm.state_of(model.model))
    assert torch.equal(again(**hm.prompts()).logits, model(**hm.prompts()).logits)


def test_a_harmonized_adapter_on_disk_is_such_an_expert(setting, tmp_path):
    base, found, safety, tasks = setting
    expert = Expert("alpha", found["alpha"].updates)
    harmonized, _ = harmonize_expert(base, expert, safety, tasks["alpha"], progress=False)
    plain = {name: type(update)(update.a, update.b, update.scaling) for name, update in harmonized.updates.items()}
    path = export_adapter(Expert("alpha", plain), tmp_path / "alpha")
    contents = gain_bytes({name: 1 + update.gain_change for name, update in harmonized.updates.items()})
    (path / GAIN_FILE).write_bytes(contents)
    tensors, metadata = read_tensors(path / "adapter_model.safetensors")
    tensors = {name: value.clone() for name, value in tensors.items()}
    write_tensors(path / "adapter_model.safetensors", tensors, {**metadata, GAIN_MARK: sha256_of(contents)})
    read = read_expert("alpha", path, base)
    for name, update in harmonized.updates.items():
        assert torch.equal(read.updates[name].a, update.a)
        torch.testing.assert_close(read.updates[name].gain_change, update.gain_change, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="has a column gain"):
        export_adapter(read, tmp_path / "again")


def test_what_does_not_fit_is_refused(setting):
    base, found, safety, tasks = setting
    with refuses(ValueError, "config"):
        harmonize_expert(base, found["alpha"], safety, tasks["alpha"], HPAConfig(granularity="output"))
    fewer = dict(list(safety.items())[1:])
    with refuses(ValueError, "safety"):
        harmonize_expert(base, found["alpha"], fewer, tasks["alpha"])
    with refuses(ValueError, "tasks"):
        harmonize_experts(base, list(found.values()), safety, {"alpha": tasks["alpha"]})
    harmonized, _ = harmonize_expert(base, found["alpha"], safety, tasks["alpha"], progress=False)
    with pytest.raises(ValueError, match="expected an expert that was not harmonized yet"):
        harmonize_expert(base, harmonized, safety, tasks["alpha"], progress=False)
