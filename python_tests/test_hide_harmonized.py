"""HPA and the compromise on experts: as on weights and adapters, fused and routed exactly, read from adapters."""

from __future__ import annotations

import dataclasses

import hide_models as hm
import pytest
import torch
from helpers import refuses
from tiny_models import batches

from hpa_ext import CompromiseConfig, Gram, NumericalError, calibrate, harmonize, harmonize_adapter, save_grams
from hpa_ext.checkpoints.gain_file import GAIN_FILE, GAIN_MARK, gain_bytes, sha256_of
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hide import HiDeConfig, HiDeModel, harmonize_experts
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert
from hpa_ext.hide.export import export_adapter
from hpa_ext.hide.harmonized import harmonize_expert
from hpa_ext.hide.tensor_files import read_tensors, write_tensors
from hpa_ext.hpa import HPAConfig
from hpa_ext.models.skeleton import skeleton
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


@pytest.mark.parametrize("config", [HPAConfig(), CompromiseConfig()])
def test_harmonized_experts_are_fused_and_routed_exactly(setting, config):
    base, found, safety, tasks = setting
    experts, reports = harmonize_experts(base, list(found.values()), safety, tasks, config, progress=False)
    by_hpa = isinstance(config, HPAConfig)
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
            changes = [expert.updates[name].gain_change for expert in experts]
            start = total.clone()
            if by_hpa:
                assert any(change.any() for change in changes)
                start += total * sum(value * change.double() for value, change in zip(d, changes, strict=True))
            else:
                assert changes == [None] * 3
            assert not torch.equal(experts[0].updates[name].a, found["alpha"].updates[name].a)
            exact[name] = start + sum(
                value * hm.delta(expert.updates[name]) for value, expert in zip(d, experts, strict=True)
            )
            largest = max(largest, float((start - total).abs().max()))
        plain = hm.exact_copy(base, exact)
        alone = hm.row_of(batch, row, (1, 1, 1, 1))
        alone["pixel_values"] = alone["pixel_values"].double()
        torch.testing.assert_close(logits[row, -1].double(), plain(**alone).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert (largest > 1e-3) is by_hpa  # the gains are no rounding error


@pytest.mark.parametrize("config", [HPAConfig(), CompromiseConfig()])
def test_a_saved_model_keeps_the_experts(setting, tmp_path, config):
    base, found, safety, tasks = setting
    experts, _ = harmonize_experts(base, list(found.values()), safety, tasks, config, progress=False)
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


def is_top(name):
    return ".layers.2." in name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CompromiseConfig(), CompromiseConfig(strength=3.0, earlier_strength=0.5)])
def test_the_compromise_is_that_of_the_adapter(setting, tmp_path, config, dtype):
    base, found, safety, tasks = setting
    for task, expert in found.items():
        updates = {
            name: dataclasses.replace(update, a=update.a.to(dtype), b=update.b.to(dtype))
            for name, update in expert.updates.items()
        }
        found = found | {task: Expert(task, updates, expert.projector)}
    experts, reports = harmonize_experts(base, list(found.values()), safety, tasks, config, progress=False)
    protecting, protected = harmonize_experts(
        base, list(found.values()), safety, tasks, config, progress=False, protect_others=HiDeConfig(top_layers=1)
    )
    assert list(reports) == list(protected) == list(hm.TASKS)
    for number, task in enumerate(hm.TASKS):
        source = export_adapter(found[task], tmp_path / task)
        others = [tasks[other] for other in hm.TASKS if other != task]
        written = {
            count: harmonize_adapter(
                source, safety, tasks[task], tmp_path / f"{task}-{count}", config, earlier=others[:count],
                progress=False,
            )
            for count in (0, 2)
        }  # fmt: skip
        alone, shared = (read_expert(task, tmp_path / f"{task}-{count}", base) for count in (0, 2))
        hm.same_expert(experts[number], alone)
        assert {update.a.dtype for update in experts[number].updates.values()} == {dtype}
        mixed = {name: (alone if is_top(name) else shared).updates[name] for name in alone.updates}
        hm.same_expert(protecting[number], Expert(task, mixed, alone.projector))
        assert reports[task].layers == written[0].layers
        assert reports[task].not_covered == list(found[task].projector)
        assert set(reports[task].not_covered) == set(written[0].not_covered)
        for name, report in protected[task].layers.items():
            assert report == written[0 if is_top(name) else 2][name]
            assert report.earlier_count == (0 if is_top(name) else 2)
            assert (report.kept_norm < reports[task][name].kept_norm) is not is_top(name)
        again = export_adapter(protecting[number], tmp_path / f"{task}-again")  # no gain: plain PEFT holds it
        hm.same_expert(read_expert(task, again, base), protecting[number])


def test_experts_that_protect_each_other_add_up_to_regmean(setting):
    base, found, safety, tasks = setting
    config = CompromiseConfig(strength=2.0)
    experts, _ = harmonize_experts(
        base, list(found.values()), safety, tasks, config, progress=False, protect_others=HiDeConfig(top_layers=0)
    )

    def damped(gram):
        matrix = gram.matrix().double()
        return matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)

    for name in found["alpha"].updates:
        matrices = {task: damped(tasks[task][name]) for task in hm.TASKS}
        wanted = sum(hm.delta(found[task].updates[name]) @ matrices[task] for task in hm.TASKS)
        expected = torch.linalg.solve(sum(matrices.values()) + 2 * damped(safety[name]), wanted, left=False)
        total = sum(hm.delta(expert.updates[name]) for expert in experts)
        assert float((total - expected).norm() / expected.norm()) < 1e-3
        plain = sum(hm.delta(expert.updates[name]) for expert in found.values())
        assert float((plain - expected).norm() / expected.norm()) > 0.1


def test_gram_files_budgets_at_both_ends_and_a_base_without_weights(setting, tmp_path):
    base, found, safety, tasks = setting
    expert = found["alpha"]
    same, _ = harmonize_expert(base, expert, safety, tasks["alpha"], CompromiseConfig(budget=1.0), progress=False)
    hm.same_expert(same, expert)
    old, _ = harmonize_expert(base, expert, safety, tasks["alpha"], CompromiseConfig(budget=0.0), progress=False)
    assert not any(update.a.any() for update in old.updates.values())
    base.save_pretrained(tmp_path / "base")
    empty = skeleton(tmp_path / "base")
    assert next(empty.parameters()).device.type == "meta"
    packed = hm.llava_of()
    for name in expert.updates:
        module = packed.get_submodule(name)
        module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    expected, _ = harmonize_expert(base, expert, safety, tasks["alpha"], CompromiseConfig(), progress=False)
    for other in (empty, packed):
        result, _ = harmonize_expert(other, expert, safety, tasks["alpha"], CompromiseConfig(), progress=False)
        hm.same_expert(result, expected)
    files = {"safety": tmp_path / "safety.safetensors", "task": tmp_path / "task.safetensors"}
    save_grams(safety, files["safety"])
    save_grams(tasks["alpha"], str(files["task"]))
    for config in (CompromiseConfig(), HPAConfig()):
        from_memory, _ = harmonize_expert(base, expert, safety, tasks["alpha"], config, progress=False)
        from_files, _ = harmonize_expert(base, expert, **files, config=config, progress=False)
        hm.same_expert(from_files, from_memory)


def test_what_the_compromise_cannot_do_is_refused(setting):
    base, found, safety, tasks = setting
    expert, experts, config = found["alpha"], list(found.values()), CompromiseConfig()
    name = next(iter(expert.updates))
    with refuses(TypeError, "config"):
        harmonize_expert(base, expert, safety, tasks["alpha"], {"strength": 1.0})
    with refuses(ValueError, "task"):
        harmonize_expert(base, expert, safety, {}, config)
    with refuses(TypeError, "safety"):
        harmonize_expert(base, expert, [1], tasks["alpha"], config)
    diagonal = {**safety, name: GramDiagonal.of(safety[name])}
    with pytest.raises(TypeError, match=rf"^{name}: safety: a GramDiagonal holds the diagonal .+ needs the whole Gram"):
        harmonize_expert(base, expert, diagonal, tasks["alpha"], config)
    width = safety[name].in_features
    with pytest.raises(ValueError, match=f"^{name}: its Gram in task has counted no tokens"):
        harmonize_expert(base, expert, safety, {**tasks["alpha"], name: Gram(width)}, config)
    with pytest.raises(ValueError, match=f"^{name}: expected a Gram of {width} features in task, got 3"):
        harmonize_expert(base, expert, safety, {**tasks["alpha"], name: Gram(3).update(torch.ones(1, 3))}, config)
    by_hpa, _ = harmonize_expert(base, expert, safety, tasks["alpha"], progress=False)
    with pytest.raises(ValueError, match="expected an expert that was not harmonized yet"):
        harmonize_expert(base, by_hpa, safety, tasks["alpha"], config)
    with refuses(TypeError, "protect_others"):
        harmonize_experts(base, experts, safety, tasks, config, protect_others=True)
    with refuses(ValueError, "protect_others"):
        harmonize_experts(base, experts, safety, tasks, HPAConfig(), protect_others=HiDeConfig())
    with refuses(ValueError, "top_layers"):
        harmonize_experts(base, experts, safety, tasks, config, protect_others=HiDeConfig(top_layers=4))
    lacking = {**tasks, "beta": {module: gram for module, gram in tasks["beta"].items() if module != name}}
    with refuses(ValueError, "tasks['beta']"):
        harmonize_experts(base, [expert], safety, lacking, config, protect_others=HiDeConfig())
    # Where nothing is fused, nothing of the other tasks is needed.
    harmonize_experts(base, [expert], safety, lacking, config, False, protect_others=HiDeConfig(top_layers=3))


def test_numbers_that_fail_name_the_module(setting):
    base, found, _, _ = setting
    name, update = next(iter(found["alpha"].updates.items()))
    width = update.a.shape[1]
    expert = Expert("alpha", {name: dataclasses.replace(update, a=torch.full_like(update.a, 3e4).half())})
    # The task's features are all equal, and all but the first one are the safety set's: the first takes them all over.
    features = torch.ones(4, width)
    task = {name: Gram(width).update(features)}
    features[:, 0] = 0
    safety = {name: Gram(width).update(features + torch.eye(4, width).roll(1, 1))}
    with pytest.raises(NumericalError, match=rf"{name}: the new A overflows torch.float16"):
        harmonize_expert(base, expert, safety, task, CompromiseConfig(strength=1e6, damping=1e-6), progress=False)
    zero = {name: Gram(width).update(torch.zeros(4, width))}
    with pytest.raises(NumericalError, match=rf"{name}: gram.safety: the matrix is zero"):
        harmonize_expert(base, expert, zero, task, CompromiseConfig(), progress=False)
