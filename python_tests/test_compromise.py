"""The compromise on one layer against least squares on the activations, at its ends, and on bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from compromise_oracle import activations, change, gram, least_squares
from helpers import assert_same_bits
from torch import nn

import hpa_ext
from hpa_ext import CompromiseConfig, Gram, GramDiagonal, GramPair, NumericalError
from hpa_ext.compromise.grams import read_full_grams
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport, report_warnings
from hpa_ext.compromise.solution import Compromise, UpdateRows
from hpa_ext.continual.output_change import OutputChange

CASES = {
    "full rank": {"rows": 9, "width": 12},
    "few safety tokens": {"rows": 5, "width": 24, "safety_count": 6},
    "low rank": {"rows": 7, "width": 20, "rank": 3},
    "dead features": {"rows": 6, "width": 10, "dead": (0, 7)},
    "one input": {"rows": 4, "width": 1},
    "one output": {"rows": 1, "width": 8},
    "many outputs": {"rows": 70, "width": 11},
}


class Setting:
    """Weights before and after, and the activations of both sets."""

    def __init__(self, rows=9, width=12, safety_count=30, rank=None, dead=(), dtype=torch.float32):
        generator = torch.Generator().manual_seed(7)
        self.old = torch.randn(rows, width, generator=generator).to(dtype)
        self.new = (self.old.float() + 0.1 * torch.randn(rows, width, generator=generator)).to(dtype)
        self.safety = activations(safety_count, width, 1, rank=rank, dead=dead)
        self.task = activations(90, width, 2, rank=rank, dead=dead)
        self.pair = GramPair(gram(self.safety), gram(self.task))

    @property
    def update(self):
        return self.new.double() - self.old.double()

    def run(self, *, earlier=(), **settings):
        return hpa_ext.harmonize(
            self.old, self.new, self.pair, config=CompromiseConfig(**settings), earlier=earlier, return_report=True
        )


@pytest.mark.parametrize("strength", [1e-3, 0.3, 1.0, 50.0, 1e5])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_least_squares_solution(case, strength):
    setting = Setting(**CASES[case])
    ours, report = setting.run(strength=strength)
    exact = least_squares(setting.update, setting.safety, setting.task, strength)
    error = (ours.double() - setting.old.double() - exact).norm() / setting.update.norm()
    assert error < 2e-5
    assert report.strength == strength and report.budget is None and report.precision_bits in (32, 64)


def test_in_float64_to_many_digits():
    setting = Setting(width=15, safety_count=8)
    exact = least_squares(setting.update, setting.safety, setting.task, 0.7)
    matrices = [x.double().mT @ x.double() * (2 / len(x)) for x in (setting.safety, setting.task)]
    ours = hpa_ext.harmonize(
        setting.old.double(), setting.new.double(), tuple(matrices), config=CompromiseConfig(strength=0.7)
    )
    assert ours.dtype == torch.float64
    assert (ours - setting.old.double() - exact).norm() / exact.norm() < 1e-11


@pytest.mark.parametrize(("strength", "earlier_strength"), [(2.0, 0.1), (0.01, 5.0), (0.0, 0.3), (1.0, 0.0)])
def test_earlier_tasks_are_protected_by_their_own_strength(strength, earlier_strength):
    setting = Setting(width=15, safety_count=8)
    others = [activations(20, 15, seed) for seed in (11, 12)]
    settings = {"strength": strength, "earlier_strength": earlier_strength}
    ours, report = setting.run(**settings, earlier=[gram(x) for x in others])
    exact = least_squares(
        setting.update, setting.safety, setting.task, strength, earlier=others, earlier_strength=earlier_strength
    )
    assert (ours.double() - setting.old.double() - exact).norm() / exact.norm() < 2e-5
    assert report.earlier_count == 2 and report.strength == strength
    whole = sum(change(x, setting.update) for x in others)
    left = sum(change(x, ours.double() - setting.old.double()) for x in others)
    assert report.earlier_left == pytest.approx(left / whole, rel=1e-4)
    without = setting.run(**settings)[1]
    assert without.earlier_left is None and without.earlier_count == 0


def test_a_budget_bounds_the_safety_set_with_earlier_tasks_protected_beside_it():
    setting = Setting(width=15, safety_count=8)
    others = [gram(activations(40, 15, seed)) for seed in (11, 12)]
    ours, report = setting.run(budget=0.05, earlier=others)
    assert 0.0495 <= report.safety_left <= 0.05
    plain, bare = setting.run(budget=0.05)
    assert report.earlier_left < left_of(setting, plain, others) and report.task_lost > bare.task_lost
    # The strength that was found is the multiplier: it gives the same weight.
    same, _ = setting.run(strength=report.strength, earlier=others)
    assert (same - ours).norm() <= 1e-5 * setting.update.norm()


def left_of(setting, weight, grams):
    """What a weight leaves of tuning's change on earlier tasks."""
    total = sum(one.matrix().double() for one in grams)
    update = weight.double() - setting.old.double()
    return float(torch.trace(update @ total @ update.mT) / torch.trace(setting.update @ total @ setting.update.mT))


def test_a_budget_that_the_earlier_tasks_hold_already_takes_no_strength():
    setting = Setting(width=15, safety_count=30)
    ours, report = setting.run(budget=0.5, earlier=[gram(setting.safety)], earlier_strength=100.0)
    assert report.strength == 0 and report.safety_left < 0.5 and report.evaluations == 2
    exact = least_squares(
        setting.update, setting.safety, setting.task, 0.0, earlier=[setting.safety], earlier_strength=100.0
    )
    assert (ours.double() - setting.old.double() - exact).norm() / setting.update.norm() < 2e-5


@pytest.mark.parametrize("budget", [0.9, 0.3, 0.05, 1e-3])
@pytest.mark.parametrize("case", CASES)
def test_a_budget_is_held_and_hardly_more_than_held(case, budget):
    setting = Setting(**CASES[case])
    ours, report = setting.run(budget=budget)
    left = change(setting.safety, ours.double() - setting.old.double()) / change(setting.safety, setting.update)
    assert 0.985 * budget < left <= 1.0005 * budget  # the weights are float32
    assert 0.99 * budget <= report.safety_left <= budget
    # The strength that was found is the multiplier: it gives the same weight.
    same, _ = setting.run(strength=report.strength)
    assert (same - ours).norm() <= 1e-5 * setting.update.norm()
    assert report.evaluations <= 12


def test_the_shares_are_those_of_output_change():
    setting = Setting(safety_count=8)
    ours, report = setting.run(budget=0.2)
    found = OutputChange.of(setting.old, setting.new, ours, setting.pair.safety.matrix(), setting.pair.task.matrix())
    assert report.safety_left == pytest.approx(found.safety_left, rel=1e-3)
    assert report.task_lost == pytest.approx(found.task_lost, rel=1e-3)


def test_no_other_update_within_the_budget_is_closer_to_the_tuned_outputs():
    setting = Setting(rows=3, width=8)
    ours, report = setting.run(budget=0.1, tolerance=1e-4, damping=1e-6)
    kept = ours.double() - setting.old.double()
    generator = torch.Generator().manual_seed(0)
    allowed = change(setting.safety, kept)
    for _ in range(200):
        other = kept + 0.02 * kept.norm() * torch.randn(kept.shape, generator=generator, dtype=torch.float64) / 5
        other *= min(1.0, (allowed / change(setting.safety, other)) ** 0.5)
        assert change(setting.task, other - setting.update) > change(setting.task, kept - setting.update) * (1 - 1e-3)
    scaled = setting.update * 0.1**0.5
    assert change(setting.task, scaled - setting.update) > 1.2 * report.task_lost * change(setting.task, setting.update)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ends_are_the_very_bits(dtype):
    setting = Setting(dtype=dtype)
    setting.new[0, :3] = setting.old[0, :3] = torch.tensor([-0.0, 0.0, 1.0])
    for settings in ({"strength": 0}, {"budget": 1}, {"budget": 1.0}):
        ours, report = setting.run(**settings)
        assert_same_bits(ours, setting.new)
        assert (report.strength, report.safety_left, report.task_lost) == (0, 1, 0)
        assert ours.data_ptr() != setting.new.data_ptr() and report.precision_bits == 0
    ours, report = setting.run(budget=0)
    assert_same_bits(ours, setting.old)
    assert (report.strength, report.safety_left, report.task_lost) == (math.inf, 0, 1)


@pytest.mark.parametrize("settings", [{"strength": 3.0}, {"budget": 0.05}, {"strength": 0.0}])
def test_no_update_stays_no_update(settings):
    setting = Setting(dtype=torch.bfloat16)
    setting.new = setting.old.clone()
    setting.new[0, 0] = setting.old[0, 0] = -0.0
    ours, report = setting.run(**settings)
    assert_same_bits(ours, setting.old)
    assert report.safety_left is None and report.task_lost is None and report.update_norm == report.kept_norm == 0
    assert "nothing was harmonized" in report_warnings({"x": report}, CompromiseConfig())[0]


def test_an_update_that_safety_does_not_see_is_kept():
    setting = Setting(dead=(2, 5))
    setting.pair = GramPair(setting.pair.safety, gram(activations(50, 12, 9)))
    setting.new = setting.old.clone()
    setting.new[:, [2, 5]] += 1
    ours, report = setting.run(budget=0.01)
    assert_same_bits(ours, setting.new)
    assert report.safety_left is None and report.task_lost == 0 and report.strength == 0


def test_a_huge_strength_restores_the_old_weight():
    setting = Setting(safety_count=6)
    ours, report = setting.run(strength=1e12)
    assert (ours - setting.old).norm() < 1e-5 * setting.update.norm()
    assert report.safety_left < 1e-12 and report.task_lost == pytest.approx(1, rel=1e-4)


def test_without_damping_of_safety_the_update_is_projected_onto_what_safety_does_not_span():
    setting = Setting(rows=4, width=10, safety_count=3)
    ours, report = setting.run(strength=1e6, safety_damping=0.0)
    assert report.precision_bits == 64 and report.damping_used == {"safety": 0.0, "task": 0.01}
    assert report.safety_left < 1e-7 < 1e-3 < 1 - report.task_lost
    basis = torch.linalg.svd(setting.safety.double())[2][3:]  # rows span the null space
    assert torch.allclose((ours - setting.old).double() @ (basis.mT @ basis), (ours - setting.old).double(), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_rounded_once(dtype):
    setting = Setting(dtype=dtype, safety_count=8)
    ours, _ = setting.run(strength=0.5)
    exact = setting.old.double() + least_squares(setting.update, setting.safety, setting.task, 0.5)
    assert ours.dtype == dtype
    steps = (ours.double() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert steps.max() <= 0.51 * torch.finfo(dtype).eps


@pytest.mark.parametrize("settings", [{"strength": 0.5}, {"budget": 0.1}])
def test_a_lora_changes_its_a_alone(settings):
    setting = Setting(rows=14, width=12, safety_count=8)
    a, b = torch.randn(3, 12), torch.randn(14, 3)
    grams = read_full_grams(setting.pair, 12, torch.device("cpu"))
    found = Compromise(grams, CompromiseConfig(**settings)).solve(UpdateRows.of_lora(a, b, 0.25))
    assert found.rows.shape == a.shape
    exact = least_squares(0.25 * b @ a, setting.safety, setting.task, found.strength)
    ours = 0.25 * b.double() @ found.rows.double()
    assert (ours - exact).norm() / exact.norm() < 2e-5
    dense = Compromise(grams, CompromiseConfig(**settings)).solve(UpdateRows(0.25 * b @ a))
    assert found.strength == pytest.approx(dense.strength, rel=1e-3)
    for name in ("safety_left", "task_lost"):
        assert getattr(found, name) == pytest.approx(getattr(dense, name), rel=1e-3)


def test_a_second_update_of_the_same_input_uses_the_factor_again():
    setting = Setting()
    compromise = Compromise(read_full_grams(setting.pair, 12, torch.device("cpu")), CompromiseConfig(strength=1.0))
    compromise.solve(UpdateRows(setting.new - setting.old))
    compromise.solve(UpdateRows(setting.old))
    assert compromise.factorizations == 1


def test_a_near_start_saves_evaluations():
    setting = Setting(width=40, safety_count=20)
    grams = read_full_grams(setting.pair, 40, torch.device("cpu"))
    update = UpdateRows(setting.new - setting.old)
    found = Compromise(grams, CompromiseConfig(budget=0.02)).solve(update)
    again = Compromise(grams, CompromiseConfig(budget=0.02)).solve(update, start=found.strength)
    assert again.evaluations == 1 and again.strength == pytest.approx(found.strength)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_the_activations_does_not_matter(scale):
    setting = Setting(safety_count=8)
    expected, _ = setting.run(budget=0.1)
    setting.pair = GramPair(*(gram(x * scale) for x in (setting.safety, setting.task)))
    ours, _ = setting.run(budget=0.1)
    assert (ours - expected).norm() < 1e-4 * setting.update.norm()


def test_a_weak_factor_is_made_again_in_float64():
    setting = Setting(width=40, safety_count=5, rank=5)
    ours, report = setting.run(strength=1.0, damping=1e-6)
    assert report.precision_bits == 64 and report.damping_used == {"safety": 1e-6, "task": 1e-6}
    exact = least_squares(setting.update, setting.safety, setting.task, 1.0, damping=1e-6)
    kept = ours.double() - setting.old.double()
    # The Grams themselves are float32, which moves directions that neither set has; the outputs agree.
    assert change(setting.task, kept - exact) < 1e-8 * change(setting.task, setting.update)
    lines = report_warnings({"x": report}, CompromiseConfig(damping=1e-6))
    assert lines == ["the sum of the Grams was factored in float64 in 1 layer, such as x"]


@pytest.mark.parametrize("rescue", ["none", "precision"])
def test_a_singular_sum_is_refused_with_its_minor(rescue):
    setting = Setting(dead=(3, 8))
    with pytest.raises(NumericalError, match=r"not positive definite: leading minor 4 fails with damping 0") as error:
        setting.run(strength=1.0, damping=0.0, rescue=rescue)
    assert error.value.failing_minor == 4 and error.value.damping == 0


def test_damping_as_a_rescue_is_reported():
    setting = Setting(dead=(3, 8))
    ours, report = setting.run(strength=1.0, damping=0.0)
    assert torch.isfinite(ours).all()
    assert report.damping_used == {"safety": 1e-4, "task": 1e-4} and report.precision_bits == 64
    assert "needed more damping in 1 layer" in report_warnings({"x": report}, CompromiseConfig(damping=0.0))[0]


def spoilt(matrix, index=(1, 1), value=math.nan):
    matrix = matrix.clone()
    matrix[index] = value
    return matrix


def bad_inputs():
    s = Setting()
    old, new, pair = s.old, s.new, s.pair
    safety, task = pair.safety.matrix(), pair.task.matrix()
    nan = new.clone()
    nan[0, 0] = math.nan
    return {
        "GramDiagonal": (old, new, (GramDiagonal.of(pair.safety), pair.task), {}, TypeError, "gram.safety: a GramDiag"),
        "no Gram": (old, new, (pair.safety, 3), {}, TypeError, "gram.task: expected a Gram or a matrix"),
        "no pair": (old, new, pair.safety, {}, TypeError, "gram: expected a GramPair"),
        "width": (old, new, (gram(torch.randn(4, 5)), pair.task), {}, ValueError, r"gram.safety: expected \[12, 12\]"),
        "no tokens": (old, new, (pair.safety, Gram(12)), {}, ValueError, "gram.task: .*counted no tokens"),
        "asymmetric": (old, new, (safety, spoilt(task, (0, 1), 99.0)), {}, ValueError, "gram.task: .*symmetric"),
        "integers": (old, new, (safety, task.long()), {}, TypeError, "gram.task: expected float32 or float64"),
        "NaN on the diagonal": (old, new, (spoilt(safety), task), {}, NumericalError, "gram.safety: .*NaN or Inf"),
        "NaN beside it": (old, new, (safety, spoilt(task, (0, 3))), {}, NumericalError, "gram.task: .*NaN or Inf"),
        "Inf": (old, new, (safety, spoilt(task, (2, 2), math.inf)), {}, NumericalError, "gram.task: .*NaN or Inf"),
        "zero": (old, new, (safety * 0, task), {}, NumericalError, "gram.safety: the matrix is zero"),
        "NaN weight": (old, nan, pair, {}, NumericalError, "layer_new: the weight .* holds 1 NaN"),
        "NaN old": (nan, new, pair, {}, NumericalError, "layer_old: the weight .* holds 1 NaN"),
        "huge update": (old, new + 1e30, pair, {}, NumericalError, "too large for these Grams"),
        "shapes": (old[:-1], new, pair, {}, ValueError, "w_new: expected shape"),
        "dtypes": (old.half(), new, pair, {}, TypeError, "w_new: expected"),
        "earlier kind": (old, new, pair, {"earlier": pair.task}, TypeError, "earlier: expected a sequence"),
        "earlier width": (old, new, pair, {"earlier": [torch.eye(3)]}, ValueError, r"earlier\[0\]: expected \[12"),
        "earlier diagonal": (
            old, new, pair, {"earlier": [GramDiagonal.of(pair.task)]}, TypeError, r"earlier\[0\]: a GramDiagonal"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input(case):
    old, new, pair, more, error, message = bad_inputs()[case]
    before = new.clone()
    for run in (hpa_ext.harmonize, hpa_ext.harmonize_):
        with pytest.raises(error, match=message) as raised:
            run(old, new, pair, config=CompromiseConfig(), **more)
        assert torch.equal(torch.nan_to_num(new), torch.nan_to_num(before))
        if "NaN" in message:
            assert raised.value.failing_minor == -1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 1.0, "budget": 0.1}, "strength, budget: expected one of them"),
        ({"strength": -1}, "strength: expected a finite number, at least 0"),
        ({"strength": math.inf}, "strength: expected a finite number"),
        ({"strength": True}, "strength: expected a finite number"),
        ({"budget": 1.5}, "budget: expected a share"),
        ({"budget": -0.1}, "budget: expected a finite number, at least 0"),
        ({"budget": math.nan}, "budget: expected a finite number"),
        ({"damping": None}, "damping: expected a finite number"),
        ({"safety_damping": -1}, "safety_damping: expected a finite number"),
        ({"tolerance": 0}, "tolerance: expected a share"),
        ({"tolerance": 1.0}, "tolerance: expected a share"),
        ({"rescue": "hope"}, "rescue: expected one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CompromiseConfig(**settings)


def test_the_default_is_a_budget():
    assert CompromiseConfig().budget == 0.1 and CompromiseConfig().strength is None
    assert CompromiseConfig(strength=1).budget is None
    assert CompromiseConfig(**CompromiseConfig(strength=2.0).to_dict()) == CompromiseConfig(strength=2.0)


def test_modules_and_in_place():
    from transformers.pytorch_utils import Conv1D

    setting = Setting()
    expected, _ = setting.run(strength=0.5)
    layers = []
    for weight in (setting.old, setting.new):
        linear, conv = nn.Linear(12, 9), Conv1D(9, 12)
        with torch.no_grad():
            linear.weight.copy_(weight)
            conv.weight.copy_(weight.mT)
        layers.append((linear, conv))
    config = CompromiseConfig(strength=0.5)
    for place, layout in ((0, expected), (1, expected.mT)):
        pair = layers[0][place], layers[1][place]
        assert torch.equal(hpa_ext.harmonize(*pair, setting.pair, config=config), layout)
        report = hpa_ext.harmonize_(*pair, setting.pair, config=config)
        assert isinstance(report, CompromiseLayerReport)
        assert torch.equal(pair[1].weight, layout)
    with pytest.raises(ValueError, match="same memory"):
        hpa_ext.harmonize_(setting.old, setting.old, setting.pair, config=config)


def test_reports_are_plain_values_and_a_table():
    setting = Setting()
    reports = {name: setting.run(**settings)[1] for name, settings in {
        "layers.0.q": {"budget": 0.1}, "layers.1.q": {"budget": 0}, "layers.2.q": {"budget": 1}
    }.items()}  # fmt: skip
    whole = CompromiseReport(reports, CompromiseConfig(budget=0.1), warnings=["mind"], not_covered=["x"])
    values = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert [values["layers"][name]["strength"] for name in reports][1:] == ["inf", 0.0]
    for name, report in reports.items():
        assert CompromiseLayerReport.from_dict(values["layers"][name]) == report
    lines = str(whole).splitlines()
    assert lines[0].split()[:4] == ["module", "strength", "budget", "safety"]
    assert lines[3].split()[:6] == ["layers.1.q", "inf", "0.0000", "0.0000", "-", "1.0000"]
    assert lines[-2:] == ["not covered: x", "warning: mind"] and len(whole) == 3 and whole["layers.0.q"].budget == 0.1


def test_hpa_refuses_grams_of_earlier_tasks_and_other_settings():
    setting = Setting()
    with pytest.raises(ValueError, match="earlier: HPA has no place"):
        hpa_ext.harmonize(setting.old, setting.new, setting.pair, earlier=[setting.pair.task])
    with pytest.raises(TypeError, match="config: expected an HPAConfig or a CompromiseConfig, got dict"):
        hpa_ext.harmonize(setting.old, setting.new, setting.pair, config={"strength": 1})


def test_as_a_method_of_the_benchmark():
    from hpa_ext.baselines import LayerContext, method

    setting = Setting(safety_count=8)
    layer = LayerContext("x", 0.5, *setting.pair)
    expected = method("regmean").function(setting.old, setting.new, layer, mu=0.3)
    ours = method("compromise").function(setting.old, setting.new, layer, strength=0.3)
    assert (ours - expected).norm() < 1e-5 * setting.update.norm()
    by_budget = method("compromise-budget").function(setting.old, setting.new, layer, budget=0.1, damping=0.02)
    assert torch.equal(by_budget, setting.run(budget=0.1, damping=0.02)[0])
    assert [report.budget for report in layer.records] == [None, 0.1]
