"""harmonize against HPA written out in float64 numpy, its invariants, and every bad input."""

from __future__ import annotations

import itertools

import hpa_oracle as oracle
import numpy as np
import pytest
import torch
from torch import nn

import hpa_ext
from hpa_ext import GramPair, HPAConfig, NumericalError, harmonize, harmonize_
from hpa_ext.hpa.config import column_count


def make_layer(rows=48, columns=64, dtype=torch.float32, seed=0, scale=0.1, device="cpu"):
    """Weights before and after, and activations whose features differ in size, so that columns differ in importance."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, columns, generator=generator)
    new = old * (1 + scale / 3) + scale * torch.randn(rows, columns, generator=generator)
    sizes = torch.rand(2, columns, generator=generator) * 3 + 0.2
    activations = [torch.randn(300, columns, generator=generator) * size for size in sizes]
    return old.to(device, dtype), new.to(device, dtype), [x.to(device) for x in activations]


def make_grams(activations):
    return GramPair(*(hpa_ext.Gram(x.shape[1], device=x.device).update(x) for x in activations))


def matrices_of(activations):
    return [2 / len(x) * (x.double().T @ x.double()).cpu().numpy() for x in activations]


SETTINGS = [
    dict(zip(("granularity", "importance", "orthogonal"), values, strict=True))
    for values in itertools.product(("input", "output"), ("quotient", "product"), (True, False))
] + [
    {"safety_scores": True, "shared_selection": False},
    {"safety_scores": False, "shared_selection": True},
    {"safety_scores": False, "shared_selection": False},
    {"focus_multiple": 1.0},
    {"focus_multiple": 7.0, "retain_min": 20.0, "retain_max": 40.0},
    {"retain_min": 0.0, "retain_max": 0.0},
    {"retain_min": 100.0, "retain_max": 100.0},
    {"damping": 0.5, "alpha_min": 0.1, "alpha_max": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_equals_the_equations(settings, depth, device):
    old, new, activations = make_layer(device=device)
    expected, retained, alpha, coefficient = oracle.harmonize(
        old.cpu(), new.cpu(), *matrices_of(activations), depth=depth, **settings
    )
    weight, report = harmonize(old, new, make_grams(activations), depth, HPAConfig(**settings), return_report=True)
    assert report.retained.nonzero().flatten().tolist() == retained
    assert report.alpha == pytest.approx(alpha, abs=1e-5)
    assert report.projection_coefficient == pytest.approx(coefficient, rel=1e-4, abs=1e-7)
    np.testing.assert_allclose(weight.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert weight.dtype == new.dtype and weight.device == new.device and weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_invariants(dtype, device):
    old, new, activations = make_layer(rows=77, columns=130, dtype=dtype, device=device)
    before = old.clone(), new.clone()
    weight, report = harmonize(old, new, make_grams(activations), 0.25, return_report=True)
    retained = report.retained.to(device)
    assert weight.dtype == dtype
    assert torch.equal(weight[:, retained], old[:, retained]), "retained columns must be bit-identical"
    assert report.retained_count == column_count(12.5, 130) == 16
    assert torch.equal(old, before[0]) and torch.equal(new, before[1]), "the inputs must not change"
    adjusted = new.double() - report.projection_coefficient * old.double()
    cosine = ((adjusted - old.double()) * old.double()).sum() / old.double().square().sum()
    assert abs(cosine) < 1e-6, "the adjusted update must be orthogonal to the old weight"
    kept = ~retained
    tolerance = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(weight[:, kept].double(), adjusted[:, kept], rtol=tolerance, atol=1e-6)


def test_report_says_what_happened():
    old, new, (safety, task) = make_layer()
    safety[:, [3, 5]] = 0
    _, report = harmonize(old, new, make_grams((safety, task)), 0.5, return_report=True)
    assert report.retain_percent == 10.0
    assert report.dead_columns == {"safety": 2, "task": 0}
    assert report.damping_used == {"safety": 0.01, "task": 0.01}
    assert report.precision_bits == {"safety": 32, "task": 32}
    assert report.shared_count == int((report.safety_columns & report.task_columns).sum())
    assert int(report.safety_columns.sum()) == int(report.task_columns.sum()) == column_count(20, 64)
    assert report.update_norm == pytest.approx(float((new - old).norm()), rel=1e-5)
    assert set(report.backend) == {"column_scores", "project_merge", "column_mask", "inverse_diagonal"}
    values = report.to_dict()
    assert values["retained"] == report.retained.nonzero().flatten().tolist()


def test_layers_and_tuples_and_matrices_are_the_same():
    old, new, activations = make_layer()
    pair = make_grams(activations)
    expected = harmonize(old, new, pair)
    linear_old, linear_new = nn.Linear(64, 48), nn.Linear(64, 48, bias=False)
    linear_old.weight.data, linear_new.weight.data = old.clone(), new.clone()
    assert torch.equal(harmonize(linear_old, linear_new, tuple(pair)), expected)
    matrices = (pair.safety.matrix(), pair.task.matrix())
    torch.testing.assert_close(harmonize(old, new, matrices), expected)
    assert not harmonize(linear_old, linear_new, pair).requires_grad


def test_conv1d_is_transposed():
    from transformers.pytorch_utils import Conv1D

    old, new, activations = make_layer()
    pair = make_grams(activations)
    expected = harmonize(old, new, pair)
    layers = Conv1D(48, 64), Conv1D(48, 64)
    for layer, weight in zip(layers, (old, new), strict=True):
        layer.weight.data = weight.T.contiguous()
    merged = harmonize(*layers, pair)
    torch.testing.assert_close(merged, expected.T)  # sums over another layout differ in their last bits
    harmonize_(*layers, pair)
    assert torch.equal(layers[1].weight.data, merged)


@pytest.mark.parametrize("granularity", ["input", "output"])
def test_in_place_equals_out_of_place(granularity):
    old, new, activations = make_layer(dtype=torch.bfloat16)
    pair, config = make_grams(activations), HPAConfig(granularity=granularity)
    expected, report = harmonize(old, new, pair, 0.5, config, return_report=True)
    old_before = old.clone()
    in_place = harmonize_(old, new, pair, 0.5, config)
    assert torch.equal(new, expected) and torch.equal(old, old_before)
    assert torch.equal(in_place.retained, report.retained) and in_place.alpha == report.alpha


def test_no_update_gives_the_old_weight_back():
    old, _, activations = make_layer()
    weight, report = harmonize(old, old.clone(), make_grams(activations), return_report=True)
    assert torch.equal(weight, old)
    assert report.projection_coefficient == 0 and report.alpha == pytest.approx(0.6)


def test_zero_old_weight_has_no_projection():
    _, new, activations = make_layer()
    weight, report = harmonize(torch.zeros_like(new), new, make_grams(activations), return_report=True)
    assert report.projection_coefficient == 0
    assert torch.equal(weight[:, ~report.retained], new[:, ~report.retained])


def test_normalization_moves_alpha_as_methods_say():
    """With sums, 8 against 128 samples shift the mean log ratio by log(8/128): alpha is pinned near its lower bound."""
    old, new, (x, _) = make_layer()
    pair = GramPair(hpa_ext.Gram(64).update(x), hpa_ext.Gram(64).update(x.repeat(16, 1)))
    _, mean = harmonize(old, new, pair, return_report=True)
    _, total = harmonize(old, new, pair, config=HPAConfig(normalization="sum"), return_report=True)
    assert mean.alpha == pytest.approx(0.6, abs=1e-4)
    assert total.alpha == pytest.approx(0.6 + 0.2 * np.tanh(np.log(8 / 128)), abs=1e-4)


def test_repeatable_to_the_bit():
    old, new, activations = make_layer(rows=300, columns=257, dtype=torch.bfloat16)
    first = harmonize(old, new, make_grams(activations))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(harmonize(old, new, make_grams(activations)), first)
    torch.set_num_threads(2)


# --- what is refused ------------------------------------------------------------------------------------------------
def bad_calls():
    old, new, activations = make_layer()
    pair = make_grams(activations)
    asymmetric = pair.safety.matrix()
    asymmetric[0, 1] += 1e3
    nan_matrix = pair.task.matrix()
    nan_matrix[4, 4] = torch.nan
    nan_new, inf_old = new.clone(), old.clone()
    nan_new[2, 3], inf_old[0, 0] = torch.nan, torch.inf
    empty = hpa_ext.Gram(64)
    return {
        "shape": ((old, new[:-1], pair), {}, ValueError, r"w_new: expected shape \[48, 64\].*got.*\[47, 64\]"),
        "dtype": ((old, new.half(), pair), {}, TypeError, r"w_new: expected dtype torch.float32.*float16"),
        "integer": ((old.int(), new.int(), pair), {}, TypeError, r"w_old: .*int32"),
        "device": ((old, new.to("meta"), pair), {}, ValueError, r"w_new: expected device cpu.*meta"),
        "vector": ((old[0], new[0], pair), {}, ValueError, r"w_old: expected shape \[out, in\]"),
        "layer": ((old, nn.Conv2d(3, 3, 3), pair), {}, TypeError, r"layer_new: expected .*Conv2d"),
        "gram type": ((old, new, pair.safety), {}, TypeError, r"gram: expected a GramPair or a tuple.*Gram"),
        "gram width": (
            (old, new, (hpa_ext.Gram(5), pair.task)),
            {},
            ValueError,
            r"gram.safety: expected \[64, 64\].*5",
        ),
        "gram device": (
            (old, new, (pair.safety, torch.eye(64, device="meta"))),
            {},
            ValueError,
            r"gram.task: .*device",
        ),
        "gram none": ((old, new, (None, pair.task)), {}, TypeError, r"gram.safety: expected a Gram"),
        "no tokens": ((old, new, (empty, pair.task)), {}, ValueError, r"gram.safety: .*no tokens"),
        "asymmetric": ((old, new, (asymmetric, pair.task)), {}, ValueError, r"gram.safety: .*symmetric"),
        "nan gram": ((old, new, (pair.safety, nan_matrix)), {}, NumericalError, r"gram.task: .*NaN"),
        "zero gram": ((old, new, (torch.zeros(64, 64), pair.task)), {}, NumericalError, r"gram.safety: .*zero"),
        "nan weight": ((old, nan_new, pair), {}, NumericalError, r"layer_new: .*1 NaN or Inf"),
        "inf weight": ((inf_old, new, pair), {}, NumericalError, r"layer_old: .*1 NaN or Inf"),
        "depth high": ((old, new, pair, 1.5), {}, ValueError, r"depth: .*1.5"),
        "depth type": ((old, new, pair, "0.5"), {}, ValueError, r"depth: "),
        "config": ((old, new, pair, 0.5, {"damping": 0}), {}, TypeError, r"config: expected an HPAConfig .*, got dict"),
    }


@pytest.mark.parametrize("case", bad_calls().keys())
def test_bad_input_is_refused_and_nothing_is_written(case):
    args, kwargs, error, message = bad_calls()[case]
    with pytest.raises(error, match=message):
        harmonize(*args, **kwargs)
    target = args[1]
    if isinstance(target, torch.Tensor) and target.device.type == "cpu":
        before = target.clone()
        with pytest.raises(error, match=message):
            harmonize_(*args, **kwargs)
        assert torch.equal(torch.nan_to_num(target), torch.nan_to_num(before))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain_min": 20.0, "retain_max": 10.0}, "retain_min"),
        ({"retain_max": 101.0}, "retain_max"),
        ({"retain_min": float("nan")}, "retain_min: expected a finite number"),
        ({"alpha_min": 0.9, "alpha_max": 0.8}, "alpha_min"),
        ({"focus_multiple": 0.5}, "focus_multiple: expected at least 1"),
        ({"damping": -0.1}, "damping"),
        ({"granularity": "column"}, "granularity: expected one of input, output, got 'column'"),
        ({"importance": "sum"}, "importance"),
        ({"normalization": "none"}, "normalization"),
        ({"rescue": "always"}, "rescue"),
        ({"alpha_max": "0.8"}, "alpha_max"),
        ({"orthogonal": 1}, "orthogonal: expected a bool"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        HPAConfig(**settings)


def test_column_count_rounds_half_up_and_stays_in_range():
    assert [column_count(p, 10) for p in (0, 4.9, 5, 14.9, 15, 100, 250)] == [0, 0, 1, 1, 2, 10, 10]


@pytest.mark.parametrize(
    ("scale", "weight_scale", "message"),
    [
        (1e-20, 1.0, r"gram\.safety: too small, its inverse overflows torch\.float32"),
        (1e17, 1e3, r"gram\.safety: too large for these weights, the scores overflow torch\.float32"),
    ],
)
def test_scores_out_of_range_are_no_choice_by_index(scale, weight_scale, message):
    old, new, activations = make_layer()
    pair = make_grams([x * scale for x in activations])
    with pytest.raises(NumericalError, match=message):
        harmonize(old * weight_scale, new * weight_scale, pair)


def test_report_of_matrices_and_of_output_granularity():
    old, new, (safety, task) = make_layer()
    safety[:, [3, 5]] = 0
    matrices = tuple(gram.matrix() for gram in make_grams((safety, task)))
    _, report = harmonize(old, new, matrices, 0.25, HPAConfig(granularity="output"), return_report=True)
    assert report.dead_columns == {"safety": 2, "task": 0} and report.depth == 0.25
    assert report.old_norm == pytest.approx(float(old.norm()), rel=1e-5)
    assert report.backend["row_scores"] == "torch" and len(report.retained) == 48


@pytest.mark.parametrize("as_matrix", [True, False])
def test_a_forbidden_rescue_is_not_made(as_matrix):
    old, new, _ = make_layer()
    gram = hpa_ext.Gram(64).update(torch.randn(2, 64))  # rank 2
    safety = gram.matrix() if as_matrix else gram
    with pytest.raises(NumericalError, match=r"gram\.safety: .*rescue='none'") as caught:
        harmonize(old, new, (safety, safety), config=HPAConfig(damping=0.0, rescue="none"))
    assert caught.value.failing_minor > 0 and caught.value.damping == 0.0


def test_a_depth_out_of_range_is_seen_before_the_weights_are_read():
    old, new, activations = make_layer()
    new[0, 0] = torch.nan
    with pytest.raises(ValueError, match="depth"):
        harmonize(old, new, make_grams(activations), 2.0)


def test_weights_too_large_for_their_squares():
    old, new, activations = make_layer()
    with pytest.raises(NumericalError, match="too large"):
        harmonize(old * 1e20, new * 1e20, make_grams(activations))


def test_task_columns_alone_are_never_retained_while_shared_selection_alone_ranks_all():
    """Column 2 is the task's alone and has a better balance than the shared column 0."""
    from hpa_ext.hpa.selection import ColumnScores, select

    safety, task = torch.tensor([10.0, 9.0, 5.0, 0.1]), torch.tensor([100.0, 1.0, 50.0, 0.0])
    scores = ColumnScores(safety[None], task[None], torch.tensor([0.6], dtype=torch.float64), [0.5])
    settings = {"retain_min": 50.0, "retain_max": 50.0, "focus_multiple": 1.0}
    assert select([scores], HPAConfig(**settings))[0][0].retained.tolist() == [True, True, False, False]
    alone = HPAConfig(**settings, safety_scores=False)
    assert select([scores], alone)[0][0].retained.tolist() == [False, True, False, True]


def test_output_granularity_beyond_one_block_of_rows():
    old, new, activations = make_layer(rows=1100, columns=8)
    expected = oracle.harmonize(old, new, *matrices_of(activations), granularity="output")
    _, report = harmonize(old, new, make_grams(activations), 0.5, HPAConfig(granularity="output"), return_report=True)
    assert report.retained.nonzero().flatten().tolist() == expected[1]


@pytest.mark.parametrize("depth", [-0.1, True, float("nan")])
def test_depths_that_are_none(depth):
    with pytest.raises(ValueError, match="depth"):
        HPAConfig().retain_percent(depth)


@pytest.mark.parametrize("settings", [{"focus_multiple": 0.99}, {"alpha_min": -0.1}, {"retain_max": True}])
def test_settings_just_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        HPAConfig(**settings)


def test_autograd_sees_that_the_weight_was_written():
    """A graph that still needs the old weight must refuse, as it does after torch's own in-place operations."""
    old, new, activations = make_layer()
    layer = nn.Linear(64, 48, bias=False)
    layer.weight.data = new
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x).sum()
    harmonize_(old, layer, make_grams(activations))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_one_tensor_cannot_be_old_and_new_in_place():
    old, _, activations = make_layer()
    with pytest.raises(ValueError, match="layer_new: is the same memory"):
        harmonize_(old, old, make_grams(activations))


def test_the_result_is_detached_and_contiguous():
    from transformers.pytorch_utils import Conv1D

    old, new, activations = make_layer()
    pair = make_grams(activations)
    assert not harmonize(old.requires_grad_(), new.requires_grad_(), pair).requires_grad
    layers = Conv1D(48, 64), Conv1D(48, 64)
    assert harmonize(*layers, pair).is_contiguous()


def test_float64_keeps_its_digits():
    old, new, activations = make_layer(dtype=torch.float64)
    matrices = [2 / len(x) * (x.double().T @ x.double()) for x in activations]
    expected, retained, _, coefficient = oracle.harmonize(old, new, *(m.numpy() for m in matrices))
    weight, report = harmonize(old, new, tuple(matrices), return_report=True)
    assert report.retained.nonzero().flatten().tolist() == retained
    assert report.projection_coefficient == pytest.approx(coefficient, rel=1e-10)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-12, atol=1e-12)
