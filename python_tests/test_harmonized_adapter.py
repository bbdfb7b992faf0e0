"""Masked A, B and a column gain: what is written, and what is read back as weights."""

from __future__ import annotations

import shutil

import adapter_models
import pytest
import tiny_models
import torch
from adapter_models import assert_equal_to_rounding
from adapter_steps import KINDS, decisions, make_steps
from helpers import assert_same_bits
from safetensors.torch import load_file

from hpa_ext import GramPair, HPAConfig
from hpa_ext.adapters import load_adapter, merge_adapter
from hpa_ext.checkpoints import CheckpointError
from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.harmonized_adapter import write_harmonized_adapter
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.hpa.low_rank import LowRankUpdate, gain_of
from hpa_ext.hpa.plan import plan_update
from hpa_ext.models.skeleton import skeleton


@pytest.fixture(scope="module", params=KINDS)
def steps(request, tmp_path_factory):
    return make_steps(request.param, tmp_path_factory.mktemp("steps"))


def test_files(steps):
    base, plain, (step, _) = steps.base, steps.plain, steps.harmonized
    model = skeleton(base)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (plain[0], step))
    retained, gain = decisions(LoraAdapter(plain[0], model), 0)
    assert list(before) == list(after)
    for name, mask in retained.items():
        a, b = (f"base_model.model.{name}.lora_{half}.weight" for half in "AB")
        assert_same_bits(after[b], before[b])
        assert_same_bits(after[a][:, ~mask], before[a][:, ~mask])
        assert (after[a][:, mask] == 0).all() and mask.any()
    assert (step / "adapter_config.json").read_bytes() == (plain[0] / "adapter_config.json").read_bytes()
    found = LoraAdapter(step, model).gain
    assert set(found) == set(gain) and all(torch.equal(found[name], gain[name]) for name in gain)
    assert sum(path.stat().st_size for path in step.iterdir()) < 2 * sum(
        path.stat().st_size for path in plain[0].iterdir()
    )


def test_retained_columns_are_the_old_bits(steps):
    base, plain, (step, _) = steps.base, steps.plain, steps.harmonized
    weights = CheckpointWeights(base, adapters=[step])
    retained, _ = decisions(LoraAdapter(plain[0], weights.model), 0)
    for name, mask in retained.items():
        new, old = weights.tensor(f"{name}.weight"), weights.base_tensor(f"{name}.weight")
        new, old = (value.mT if weights.adapters[0].sizes[name].transposed else value for value in (new, old))
        assert_same_bits(new[:, mask], old[:, mask])
        assert not torch.equal(new[:, ~mask], old[:, ~mask])


def test_weight_on_disk_equals_the_formula(steps):
    base, plain, (step, _) = steps.base, steps.plain, steps.harmonized
    weights = CheckpointWeights(base, adapters=[step])
    source = LoraAdapter(plain[0], weights.model)
    retained, gain = decisions(source, 0)
    for name, mask in retained.items():
        update, transposed = source.updates[name], source.sizes[name].transposed
        old = weights.base_tensor(f"{name}.weight")
        old = old.mT if transposed else old
        exact = old.double() * gain[name].double() + update.scaling * update.b.double() @ (update.a.double() * ~mask)
        ours = weights.tensor(f"{name}.weight")
        assert_equal_to_rounding((ours.mT if transposed else ours).contiguous(), exact.to(ours.dtype), name)


def test_step_of_hpa_as_adapter_equals_the_step_in_memory(tmp_path):
    base = adapter_models.save(tiny_models.llama(), tmp_path / "base")
    tuned = adapter_models.adapter(
        adapter_models.load(base), tmp_path / "tuned", target_modules=["q_proj", "down_proj"]
    )
    weights = CheckpointWeights(base)
    source = LoraAdapter(tuned, weights.model)
    retained, gain, expected = {}, {}, {}
    torch.manual_seed(3)
    for name, update in source.updates.items():
        size = source.sizes[name].in_features
        grams = [torch.cov(torch.randn(size, 3 * size)) for _ in range(2)]
        low_rank = LowRankUpdate(weights.tensor(f"{name}.weight"), update.a, update.b, update.scaling)
        plan = plan_update(low_rank, GramPair(*grams), 0.5, HPAConfig(retain_min=20, retain_max=30))
        expected[name] = low_rank.merge(plan.selection, plan.coefficient)
        retained[name] = plan.selection.retained
        gain[name] = gain_of(plan.selection.retained, plan.coefficient)
    (tmp_path / "step").mkdir()
    write_harmonized_adapter(source, retained, gain, tmp_path / "step")
    merged = merge_adapter(load_adapter(adapter_models.load(base), tmp_path / "step")).state_dict()
    from_disk = CheckpointWeights(base, adapters=[tmp_path / "step"])
    for name, value in expected.items():
        assert_equal_to_rounding(from_disk.tensor(f"{name}.weight"), value, name)
        assert_equal_to_rounding(merged[f"{name}.weight"], value, name)


def test_files_that_do_not_belong_together(steps, tmp_path):
    base, (step, other) = steps.base, steps.harmonized
    model = skeleton(base)
    bad = shutil.copytree(step, tmp_path / "bad")
    shutil.copy(other / "hpa_gain.safetensors", bad)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        LoraAdapter(bad, model)
    (bad / "hpa_gain.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hpa_gain.safetensors: no such file, but .* was harmonized"):
        LoraAdapter(bad, model)


def test_gain_beside_an_adapter_that_knows_nothing_of_it(steps, tmp_path):
    base, (plain, _), (step, _) = steps.base, steps.plain, steps.harmonized
    bad = shutil.copytree(plain, tmp_path / "bad")
    shutil.copy(step / "hpa_gain.safetensors", bad)
    with pytest.raises(CheckpointError, match="says nothing of a gain"):
        LoraAdapter(bad, skeleton(base))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda retained, gain, name: retained.pop(name), "same modules"),
        (lambda retained, gain, name: retained.update({name: retained[name][:-1]}), "retained.*expected bool"),
        (lambda retained, gain, name: retained.update({name: retained[name].float()}), "retained.*expected bool"),
        (lambda retained, gain, name: gain.update({name: gain[name][:-1]}), "gain.*expected a floating dtype"),
        (lambda retained, gain, name: gain.update({name: gain[name] * torch.nan}), "NaN"),
        (lambda retained, gain, name: [kind.update({"x": kind[name]}) for kind in (retained, gain)], "no LoRA on it"),
    ],
)  # fmt: skip
def test_wrong_masks_and_gains(spoil, message, steps, tmp_path):
    base, (plain, _) = steps.base, steps.plain
    source = LoraAdapter(plain, skeleton(base))
    retained, gain = decisions(source, 0)
    spoil(retained, gain, next(iter(gain)))
    with pytest.raises(ValueError, match=message):
        write_harmonized_adapter(source, retained, gain, tmp_path)
    assert not any(tmp_path.iterdir())
