"""Post-training baselines against plain loops in float64, and what must hold of them whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpa_ext import Gram
from hpa_ext.baselines import LayerContext
from hpa_ext.baselines.controls import retain_columns
from hpa_ext.baselines.dare import dare
from hpa_ext.baselines.hpa import hpa
from hpa_ext.baselines.hpa_compensated import hpa_compensated
from hpa_ext.baselines.interpolation import task_arithmetic, wise_ft
from hpa_ext.baselines.layer import inverse, inverse_factor
from hpa_ext.baselines.model_tailor import model_tailor
from hpa_ext.baselines.regmean import regmean
from hpa_ext.baselines.safe_delta import safe_delta, safe_delta_authors
from hpa_ext.baselines.safe_lora import least_aligned, projection, safe_lora
from hpa_ext.baselines.ties import merge_task_vectors, ties
from hpa_ext.hpa import HPAConfig, harmonize

ROWS, COLUMNS = 6, 19


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return old, old + 0.3 * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)


@pytest.fixture
def layer() -> LayerContext:
    return LayerContext("layers.0.q_proj", 0.5, _gram(1), _gram(2), seed=5)


def _gram(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, COLUMNS, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)  # correlated columns
    return 2 / 60 * x.mT @ x


def _damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_the_inverse_and_its_factor(layer: LayerContext) -> None:
    exact = torch.linalg.inv(_damped(layer.safety))
    _close(inverse(layer.safety, 0.01), exact)
    factor = inverse_factor(layer.safety, 0.01)
    _close(factor.mT @ factor, exact)
    assert bool((factor.tril(-1) == 0).all())


def test_a_gram_object_counts_as_its_matrix() -> None:
    gram = Gram(COLUMNS)
    gram.update(torch.randn(50, COLUMNS))
    torch.testing.assert_close(inverse(gram, 0.1), torch.linalg.inv(_damped(gram.matrix().double(), 0.1)))


# --- Safe Delta -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("s", [0.0, 0.3, 2.0, 20.0, 1e6])
def test_safe_delta_is_the_greedy_choice_with_optimal_compensation(weights, layer, s: float) -> None:
    old, new = weights
    update, hessian = new - old, _damped(layer.safety)
    diagonal = torch.linalg.inv(hessian).diagonal()
    budget = s * (1 / (2 * diagonal)).mean()
    ranked = sorted((-2 * diagonal[j].item(), j, i) for i in range(ROWS) for j in range(COLUMNS))
    taken, spent = torch.zeros(ROWS, COLUMNS, dtype=torch.bool), 0.0
    for _, j, i in ranked:
        spent += (update[i, j] ** 2 / (2 * diagonal[j])).item()
        if spent > budget:
            break
        taken[i, j] = True
    expected = torch.zeros_like(update)
    for i in range(ROWS):
        chosen, free = taken[i].nonzero().flatten(), (~taken[i]).nonzero().flatten()
        expected[i, chosen] = update[i, chosen]
        if len(chosen) and len(free):
            among, across = hessian[free][:, free], hessian[free][:, chosen]
            expected[i, free] = -torch.linalg.solve(among, across @ update[i, chosen])
    result = safe_delta(old, new, layer, s=s)
    _close(result, old + expected)
    assert torch.equal(result[taken], new[taken]) or bool((result[taken] - new[taken]).abs().max() < 1e-12)


def test_safe_delta_without_a_budget_is_old_and_with_a_large_one_new(weights, layer) -> None:
    old, new = weights
    _close(safe_delta(old, new, layer, s=0.0), old)
    _close(safe_delta(old, new, layer, s=1e9), new)


def test_compensation_of_safe_delta_lowers_the_safety_cost(weights, layer) -> None:
    old, new = weights
    result = safe_delta(old, new, layer, s=5.0)
    taken = (result - new).abs() < 1e-9
    assert 0 < int(taken.sum()) < taken.numel()
    hessian = _damped(layer.safety)

    def cost(weight: Tensor) -> float:
        return float(((weight - old) @ hessian * (weight - old)).sum())

    assert cost(result) < 0.95 * cost(torch.where(taken, new, old))


@pytest.mark.parametrize("block", [8, 2048])
def test_safe_delta_of_the_authors_against_plain_loops(weights, layer, block: int, monkeypatch) -> None:
    monkeypatch.setattr("hpa_ext.baselines.safe_delta._BLOCK_COLUMNS", block)
    old, new = weights
    s = 600.0
    factor = torch.linalg.cholesky(torch.linalg.inv(_damped(layer.safety)), upper=True)
    current = old.clone()
    for start in range(0, COLUMNS, block):
        stop = min(start + block, COLUMNS)
        price = {j: 1 / factor[j, j].item() ** 2 for j in range(start, stop)}
        entries = sorted((price[j], i * (stop - start) + j - start, i, j) for i in range(ROWS) for j in price)
        entries = entries[: len(entries) - int(0.15 * len(entries))]
        budget = sum(price.values()) / len(price) * s / 2 * ROWS / 4096
        selected, spent = set(), 0.0
        for t, _, i, j in entries:
            spent += (new[i, j] - current[i, j]).item() ** 2 * t
            if spent > budget:
                break
            selected.add((i, j))
        assert 0 < len(selected) < len(entries)
        for first in range(start, stop, 4):
            last = min(first + 4, stop)
            errors = torch.zeros(ROWS, last - first, dtype=torch.float64)
            for i in range(ROWS):
                for j in range(first, last):
                    if (i, j) in selected:
                        errors[i, j - first] = (current[i, j] - new[i, j]) / factor[j, j]
                        current[i, j] = new[i, j]
            for k in range(last, COLUMNS):
                for j in range(first, last):
                    current[:, k] -= errors[:, j - first] * factor[j, k]
    _close(safe_delta_authors(old, new, layer, s=s), current)


@pytest.mark.parametrize("function", [safe_delta, safe_delta_authors])
def test_safe_delta_refuses_a_negative_budget(weights, layer, function) -> None:
    with pytest.raises(ValueError, match="s: expected at least 0"):
        function(*weights, layer, s=-1.0)


# --- Model Tailor ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("compensation", "sign"), [("obs", -1), ("authors", 1), ("none", 0)])
def test_model_tailor_against_plain_loops(weights, layer, compensation: str, sign: int, monkeypatch) -> None:
    monkeypatch.setattr("hpa_ext.baselines.model_tailor._BLOCK_COLUMNS", 7)
    old, new = weights
    factor = torch.linalg.cholesky(torch.linalg.inv(_damped(layer.task)), upper=True)

    def standardized(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        return [(value - mean) / deviation for value in values]

    scores = {}
    for i in range(ROWS):
        for start in range(0, COLUMNS, 7):
            columns = range(start, min(start + 7, COLUMNS))
            sizes = standardized([abs((new - old)[i, j].item()) for j in columns])
            losses = standardized([new[i, j].item() ** 2 / factor[j, j].item() ** 2 for j in columns])
            for j, size, loss in zip(columns, sizes, losses, strict=True):
                scores[i, j] = 0.8 * size + 0.2 * loss
    kept = set(sorted(scores, key=scores.__getitem__, reverse=True)[: int(0.3 * ROWS * COLUMNS + 0.5)])
    current = new.clone()
    for j in range(COLUMNS):
        for i in range(ROWS):
            if (i, j) in kept:
                continue
            error = (current[i, j] - old[i, j]) / factor[j, j]
            current[i, j] = old[i, j]
            for k in range(j + 1, COLUMNS):
                current[i, k] += sign * error * factor[j, k]
    _close(model_tailor(old, new, layer, density=0.3, compensation=compensation), current)


def test_obs_compensation_lowers_the_task_error_and_the_flipped_sign_raises_it(weights, layer) -> None:
    old, new = weights

    def cost(compensation: str) -> float:
        change = model_tailor(old, new, layer, density=0.4, compensation=compensation) - new
        return float((change @ _damped(layer.task) * change).sum())

    assert cost("obs") < cost("none") < cost("authors")


def test_model_tailor_keeps_all_or_nothing_at_the_ends(weights, layer) -> None:
    old, new = weights
    assert torch.equal(model_tailor(old, new, layer, density=1.0), new)
    assert torch.equal(model_tailor(old, new, layer, density=0.0), old)
    with pytest.raises(ValueError, match="density"):
        model_tailor(old, new, layer, density=1.1)
    with pytest.raises(ValueError, match="compensation"):
        model_tailor(old, new, layer, compensation="other")


# --- SafeLoRA -------------------------------------------------------------------------------------------------------
def test_safe_lora_projects_b_and_only_below_the_threshold(weights, layer) -> None:
    old, _ = weights
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(2, COLUMNS, generator=generator, dtype=torch.float64)
    b = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    new = old + b @ a
    layer.alignment = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    onto = layer.alignment @ layer.alignment.mT / layer.alignment.norm()
    projected, cosine = projection(old, new, layer)
    _close(projected, (onto @ b) @ a)
    expected = float(torch.nn.functional.cosine_similarity(projected.flatten(), (b @ a).flatten(), dim=0))
    assert cosine == pytest.approx(expected)
    _close(safe_lora(old, new, layer, threshold=cosine + 1e-9), old + (onto @ b) @ a)
    assert torch.equal(safe_lora(old, new, layer, threshold=cosine - 1e-9), new)


def test_safe_lora_needs_the_alignment(weights, layer) -> None:
    with pytest.raises(ValueError, match="alignment"):
        safe_lora(*weights, layer)
    layer.alignment = torch.zeros(ROWS, COLUMNS)
    with pytest.raises(ValueError, match="zero"):
        safe_lora(*weights, layer)


def test_the_layers_of_least_cosine() -> None:
    assert least_aligned({"a": 0.5, "b": -0.1, "c": 0.2}, 2) == ["b", "c"]


# --- arithmetic -----------------------------------------------------------------------------------------------------
def test_wise_ft_goes_part_of_the_way(weights, layer) -> None:
    old, new = weights
    _close(wise_ft(old, new, layer, share=0.25), 0.75 * old + 0.25 * new)
    with pytest.raises(ValueError, match="share"):
        wise_ft(old, new, layer, share=1.5)


def test_task_arithmetic_scales_the_sum_of_all_updates(weights, layer) -> None:
    old, new = weights
    layer.initial, layer.earlier_updates = old - 1, (torch.full_like(old, 0.5),)
    _close(task_arithmetic(old, new, layer, scale=0.4), old - 1 + 0.4 * (0.5 + new - old))


def test_ties_by_hand() -> None:
    updates = torch.tensor([[[4.0, -3.0, 0.1, 2.0]], [[2.0, 5.0, 0.2, -1.0]]], dtype=torch.float64)
    # Half of each is kept: (4, -3, 0, 0) and (2, 5, 0, 0); signs elected (+, +); means of those that agree.
    assert merge_task_vectors(updates, 0.5).tolist() == [[3.0, 5.0, 0.0, 0.0]]
    assert merge_task_vectors(updates, 1.0)[0, 3].item() == 2.0  # +2 outweighs -1
    assert merge_task_vectors(updates, 0.0).abs().sum().item() == 0.0


def test_ties_starts_from_the_initial_weight(weights, layer) -> None:
    old, new = weights
    layer.initial = old + 2
    _close(ties(old, new, layer, scale=0.5, density=1.0), old + 2 + 0.5 * (new - old))


def test_dare_keeps_the_mean_and_repeats_itself(layer) -> None:
    old, new = torch.zeros(200, 200), torch.ones(200, 200)
    first = dare(old, new, layer, drop=0.8)
    assert torch.equal(first, dare(old, new, layer, drop=0.8))
    assert sorted(first.unique().tolist()) == pytest.approx([0.0, 5.0])
    assert float(first.mean()) == pytest.approx(1.0, abs=0.06)
    other = LayerContext("layers.0.k_proj", 0.5, layer.safety, layer.task, seed=5)
    assert not torch.equal(first, dare(old, new, other, drop=0.8))
    assert torch.equal(dare(old, new, layer, drop=0.0), new)


def test_regmean_is_where_its_objective_is_flat(weights, layer) -> None:
    old, new = weights
    weight = regmean(old, new, layer, mu=0.7).requires_grad_(True)

    def objective(w: Tensor) -> Tensor:
        towards_new = ((w - new) @ _damped(layer.task) * (w - new)).sum()
        return towards_new + 0.7 * ((w - old) @ _damped(layer.safety) * (w - old)).sum()

    (gradient,) = torch.autograd.grad(objective(weight), weight)
    assert float(gradient.abs().max()) < 1e-9 * float(objective(old))
    _close(regmean(old, new, layer, mu=0.0), new)


def test_the_controls_retain_as_many_columns_as_hpa(weights, layer) -> None:
    old, new = weights
    harmonized, report = harmonize(old, new, (layer.safety, layer.task), 0.5, return_report=True)
    for choice in ("largest", "random"):
        result = retain_columns(old, new, layer, choice=choice)
        same = (result == old).all(0)
        assert int(same.sum()) == report.retained_count
        if choice == "largest":
            sizes = (new - old).square().sum(0)
            assert float(sizes[same].min()) >= float(sizes[~same].max())
    rest = ~report.retained & ~same  # the same adjustment on what neither retains
    _close(result[:, rest], harmonized[:, rest])


def test_compensation_is_the_least_squares_solution(weights, layer) -> None:
    old, new = weights
    layer.depth = 0.0
    update, task, safety = new - old, _damped(layer.task), _damped(layer.safety)
    retained = harmonize(old, new, (layer.safety, layer.task), 0.0, return_report=True)[1].retained
    assert 0 < int(retained.sum()) < COLUMNS

    def gradient(result: Tensor, term) -> Tensor:
        free = (result - old).requires_grad_(True)
        term(free).backward()
        return free.grad

    on_task = hpa_compensated(old, new, layer)
    assert torch.equal(on_task[:, retained], old[:, retained])
    slope = gradient(on_task, lambda x: ((x - update) @ task * (x - update)).sum())
    assert float(slope[:, ~retained].abs().max()) < 1e-9 < float(slope[:, retained].abs().max())
    on_safety = hpa_compensated(old, new, layer, compensation="safety")
    _close(on_safety[:, ~retained], new[:, ~retained])
    slope = gradient(on_safety, lambda x: (x @ safety * x).sum())
    assert float(slope[:, retained].abs().max()) < 1e-9 < float(slope[:, ~retained].abs().max())


def test_columns_can_be_chosen_by_the_gram_alone(weights, layer) -> None:
    old, new = weights
    result = hpa_compensated(old, new, layer, compensation="none", scores="gram")
    same = (result == old).all(0)
    count = harmonize(old, new, (layer.safety, layer.task), 0.5, return_report=True)[1].retained_count
    assert int(same.sum()) == count
    importance = 1 / torch.linalg.inv(_damped(layer.safety)).diagonal()
    assert float(importance[same].min()) >= float(importance[~same].max())
    assert torch.equal(result[:, ~same], new[:, ~same])
    with pytest.raises(ValueError, match="compensation: expected"):
        hpa_compensated(old, new, layer, compensation="obs")
    with pytest.raises(ValueError, match="scores: expected"):
        hpa_compensated(old, new, layer, scores="columns")


# --- HPA ------------------------------------------------------------------------------------------------------------
def test_hpa_is_harmonize_and_reports_its_layer(weights, layer) -> None:
    old, new = weights
    result = hpa(old, new, layer, granularity="output")
    expected = harmonize(old, new, (layer.safety, layer.task), 0.5, HPAConfig(granularity="output"))
    assert torch.equal(result, expected)
    assert len(layer.records) == 1


@pytest.mark.parametrize(
    "function",
    [safe_delta, safe_delta_authors, model_tailor, wise_ft, task_arithmetic, ties, dare, regmean, hpa, hpa_compensated],
)
def test_inputs_stay_and_the_dtype_is_that_of_new(weights, layer, function) -> None:
    old, new = (weight.float() for weight in weights)
    layer.safety, layer.task = layer.safety.float(), layer.task.float()
    copies = old.clone(), new.clone()
    result = function(old, new, layer)
    assert result.dtype == torch.float32
    assert result.shape == new.shape
    assert torch.equal(old, copies[0])
    assert torch.equal(new, copies[1])
