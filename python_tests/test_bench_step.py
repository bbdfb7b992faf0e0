"""The step as a whole: ours and the peer's come to one result, and the clock changes none of it."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest
import torch

import hpa_ext
from hpa_ext import ops
from hpa_ext.cli import bench
from hpa_ext.gram_reduction import reduce_grams

benchmarks = bench.load_benchmarks()
bench_step, step_agreement, step_clock, step_eager, step_floors, step_model, step_ours = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("bench_step", *(f"step_{part}" for part in ("agreement", "clock", "eager", "floors", "model", "ours")))
)
Ceilings = importlib.import_module(f"{benchmarks.__name__}.ceilings").Ceilings
CPU, CONFIG, SHAPE = torch.device("cpu"), hpa_ext.HPAConfig(), bench_step.QUICK
H100 = Ceilings(copy_gb_s=3000, read_gb_s=3000, float32_tflop_s=55, bfloat16_tflop_s=800)


@pytest.fixture(scope="module")
def models():
    old = step_model.build(SHAPE, CPU, 1)
    return old, step_model.tuned_copy(old)


@pytest.fixture
def step(models):
    """Both models with the update in its place, and the prompts of both sets."""
    old, new = models
    norm = step_model.retune(old, new, 7)
    return old, new, [step_model.prompts(SHAPE, count, 3 + count) for count in SHAPE.samples], norm


def run(call, step, **options):
    old, new, sets, _ = step
    clock = step_clock.StepClock(CPU, SHAPE.layers)
    return call(old, new, *sets, CONFIG, clock, **options), clock.times()


def rows():
    return list(bench_step.rows(benchmarks.Setting(CPU, quick=True, repeats=1)))


def test_the_copy_shares_all_but_the_linears(models):
    old, new = models
    after, linears = dict(new.named_parameters()), step_model.linear_weights(old)
    assert len(linears) == 14 and old.dtype == torch.bfloat16
    for name, parameter in old.named_parameters():
        own = name.removesuffix(".weight") in linears
        assert (parameter.data_ptr() != after[name].data_ptr()) == own, name


def test_the_update_is_the_same_for_a_seed(step):
    old, new, _, norm = step
    before = {name: weight.clone() for name, weight in step_model.linear_weights(new).items()}
    olds = step_model.linear_weights(old)
    total = sum((before[name].double() - olds[name].double()).square().sum() for name in olds).sqrt()
    assert norm == pytest.approx(float(total), rel=1e-5)
    for name, weight in olds.items():
        share = float((before[name].double() - weight.double()).norm() / weight.double().norm())
        assert share == pytest.approx(step_model.UPDATE_SCALE, rel=0.2), name
    assert step_model.retune(old, new, 8) != norm
    assert step_model.retune(old, new, 7) == norm
    assert all(torch.equal(weight, before[name]) for name, weight in step_model.linear_weights(new).items())


def test_prompts_are_what_a_processor_gives(step):
    batches = step[2][1]
    assert sum(len(batch["input_ids"]) for batch in batches) == SHAPE.task_samples
    for batch in batches:
        images = batch["input_ids"] == SHAPE.vocabulary - 1
        assert batch["input_ids"].shape[1] == SHAPE.tokens and (images.sum(1) == SHAPE.image_tokens).all()
        assert bool(batch["attention_mask"].all()) and len(batch["pixel_values"]) == len(images)


def test_the_clock_changes_no_bit(step):
    old, new, (safety, task), _ = step
    diagonals = [
        reduce_grams(hpa_ext.calibrate(model, batches, progress=False), CONFIG.damping)
        for model, batches in ((old, safety), (new, task))
    ]
    report = hpa_ext.harmonize_model(old, new, *diagonals, CONFIG, progress=False)
    plain = step_agreement.Result.of(new, {name: layer.retained for name, layer in report.layers.items()})
    norm = step_model.retune(old, new, 7)
    found, _ = run(step_ours.our_step, step)
    agreement = step_agreement.compare(plain, new, found.retained(), norm)
    assert (agreement.difference, agreement.differing_columns) == (0, 0)
    assert agreement.columns == 2 * (6 * SHAPE.width + SHAPE.inner) and agreement.linears == 14


def test_nothing_of_the_clock_is_left(step):
    def state():
        functions = [hpa_ext.Gram.update, vars(hpa_ext.GramDiagonal)["of"], ops.column_scores, ops.project_merge]
        modules = [module for model in step[:2] for module in model.modules()]
        return functions + [
            hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        ]

    step[0](**step[2][0][0])  # transformers has hooks of its own, which come with the first call
    step[1](**step[2][0][0])
    before = state()
    run(step_ours.our_step, step)
    run(step_eager.eager_step, step)
    assert len(before) == len(state()) and all(one is other for one, other in zip(before, state(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peer_comes_to_the_same_result(step, dtype):
    old, new, _, norm = step
    found, _ = run(step_ours.our_step, step)
    mine = step_agreement.Result.of(new, found.retained())
    assert 0 < sum(int(mask.sum()) for mask in mine.retained.values()) < 0.2 * 2 * (6 * SHAPE.width + SHAPE.inner)
    step_model.retune(old, new, 7)
    retained, _ = run(step_eager.eager_step, step, dtype=dtype)
    agreement = step_agreement.compare(mine, new, retained, norm)
    assert agreement.differing_columns == 0 and agreement.difference < 1e-3


@pytest.mark.parametrize("side", [step_ours.our_step, step_eager.eager_step])
def test_phases_and_layers_add_up(step, side):
    _, times = run(side, step)
    assert sum(times.by_phase()) == pytest.approx(times.total_ms, rel=1e-9)
    for phase in ("forward", "Gram", "inverse diagonals", "scores", "merge"):
        assert all(layer[step_clock.PHASES.index(phase)] > 0 for layer in times.layers), phase
    assert times.by_phase()[step_clock.PHASES.index("selection")] > 0
    assert all(value >= 0 for layer in (*times.layers, times.outside) for value in layer)


def test_every_distinct_gram_is_accounted_for(step):
    found, _ = run(step_ours.our_step, step)
    expected = [
        (layer, width, samples * SHAPE.tokens, False)
        for samples in SHAPE.samples for layer in range(SHAPE.layers) for width in SHAPE.gram_widths
    ]  # fmt: skip
    assert [(one.layer, one.width, one.tokens, one.from_rows) for one in found.reduced] == expected


def test_a_phase_that_goes_by_another_name_is_told(step, monkeypatch):
    monkeypatch.setattr(step_ours, "_OPERATIONS", {"column_scores": "scores", "column_scores_list": "scores"})
    with pytest.raises(RuntimeError, match="nothing was timed as merge"):
        run(step_ours.our_step, step)


def test_a_call_for_many_weights_counts_for_their_layers(step, monkeypatch):
    old, new, _, _ = step
    weights = step_model.linear_weights(old)
    given = [weights["model.language_model.layers.0.self_attn.q_proj"]]
    given += [weights[f"model.language_model.layers.1.mlp.{name}_proj"] for name in ("gate", "up")]
    monkeypatch.setattr(ops, "project_merge_list", lambda w_old, *rest: len(w_old), raising=False)
    clock = step_clock.StepClock(CPU, 2)
    with step_ours._watched(clock, old, new, []), clock.whole():
        assert ops.project_merge_list(given) == 3
    span = clock._spans[1]
    assert span.phase == "merge" and span.shares == {0: SHAPE.width**2, 1: 2 * SHAPE.width * SHAPE.inner}


def test_the_row_has_what_is_drawn():
    (row,) = rows()
    assert row.metric == "step_vs_torch_fp32" and row.correct and row.backend == "native"
    assert row.shape == [2, 64, 176, 160] and len(row.shape) == len(row.dimensions.split(", "))
    details = json.loads(json.dumps(row.details))
    assert details["ours"]["total_ms"] == row.ours_ms and details["peer"]["total_ms"] == row.peer_ms
    assert details["agreement"]["differing_columns"] == 0 and details["grams"] == 16
    assert [len(layer) for layer in details["floor_layers"]] == [len(details["phases"])] * 2


def test_a_large_step_is_held_to_the_float32_peer(monkeypatch):
    """As on a GPU, where there are two peers; the second one is made wrong, and only its own row says so."""
    both = {"step_vs_torch_fp32": ("float32", "highest"), "step_vs_torch_tf32": ("TF32", "high")}
    assert bench_step.precisions(torch.device("cuda")) == both
    assert list(bench_step.precisions(CPU)) == ["step_vs_torch_fp32"]
    seen = []

    def eager(old, new, *rest):
        seen.append((torch.get_float32_matmul_precision(), *rest[4:]))
        found = step_eager.eager_step(old, new, *rest)
        if seen[-1][0] == "high":
            next(iter(step_model.linear_weights(new).values())).mul_(1.5)
        return found

    monkeypatch.setattr(bench_step, "precisions", lambda device: both)
    monkeypatch.setattr(bench_step, "_LARGE_WIDTH", 0)
    monkeypatch.setattr(bench_step, "eager_step", eager)
    first, second = bench_step.rows(benchmarks.Setting(CPU, quick=True))
    assert [name for name, _ in seen] == ["highest", "high"] and {dtype for _, dtype in seen} == {torch.float32}
    assert (first.peer, second.peer) == ("eager torch, float32", "eager torch, TF32")
    assert first.repeats == second.repeats == 1 and first.ours_ms == second.ours_ms
    assert first.correct and second.correct and first.error == second.error < 1e-3
    assert first.peer_error is None and second.peer_error > 1
    assert second.details["agreement"]["difference"] == second.peer_error


def _noisy_diagonal(monkeypatch):
    """Some percent wrong, here more and there less."""
    true = hpa_ext.GramDiagonal.of

    def of(gram, damping=0.01, *, rescue="damping"):
        found = true(gram, damping, rescue=rescue)
        torch.manual_seed(0)
        noise = torch.randn(found.in_features).mul(0.05).exp()
        parts = (found.dead, found.token_count, found.damping, found.damping_used, found.precision_bits)
        return hpa_ext.GramDiagonal(found.sum_inverse * noise, *parts)

    monkeypatch.setattr(hpa_ext.GramDiagonal, "of", staticmethod(of))


def _other_coefficient(monkeypatch):
    """As if the projection had taken half of its part along the old weight away once more."""
    true = hpa_ext.harmonize_model

    def harmonize_model(old, new, *rest, **options):
        report = true(old, new, *rest, **options)
        olds = step_model.linear_weights(old)
        for name, weight in step_model.linear_weights(new).items():
            coefficient = report.layers[name].projection_coefficient
            weight.copy_(weight.float() - 0.5 * coefficient * olds[name].float())
        return report

    monkeypatch.setattr(hpa_ext, "harmonize_model", harmonize_model)


@pytest.mark.parametrize("spoil", [_noisy_diagonal, _other_coefficient])
def test_a_wrong_step_is_wrong(monkeypatch, spoil):
    assert rows()[0].correct
    spoil(monkeypatch)
    (row,) = rows()
    assert not row.correct and row.error > row.error_limit
    assert row.peer_error < row.error_limit, "the peer is still right"


@pytest.mark.parametrize("wrong_run", [1, 2])
@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_step_that_is_wrong_once_is_told_and_not_saved(monkeypatch, tmp_path, capsys, wrong_run, value):
    true, runs = hpa_ext.harmonize_model, []

    def harmonize_model(old, new, *rest, **options):
        report = true(old, new, *rest, **options)
        runs.append(1)
        if len(runs) == wrong_run:
            next(iter(step_model.linear_weights(new).values())).mul_(value)
        return report

    monkeypatch.setattr(hpa_ext, "harmonize_model", harmonize_model)
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    options = ["--quick", "--repeats", "2", "--out", str(out), "--time-line", str(picture)]
    args = parser.parse_args(["bench", "step", *options])
    assert args.run(args) == 1
    printed = capsys.readouterr()
    assert "a result was WRONG" in printed.err and list(tmp_path.iterdir()) == []
    assert ("the weights are not finite" in printed.out) == (value != value)
    assert len(runs) == 2


def test_differences_are_counted(step):
    old, new, _, norm = step
    retained = {name: torch.zeros(w.shape[1], dtype=torch.bool) for name, w in step_model.linear_weights(new).items()}
    result = step_agreement.Result.of(new, {name: mask.clone() for name, mask in retained.items()})
    name = "model.language_model.layers.1.mlp.down_proj"
    retained[name][5] = True
    weight = step_model.linear_weights(new)[name]
    change = weight[:, 5].double() - step_model.linear_weights(old)[name][:, 5].double()
    weight[:, 5] = step_model.linear_weights(old)[name][:, 5]
    found = step_agreement.compare(result, new, retained, norm)
    assert (found.differing_columns, found.differing_linears) == (1, 1)
    assert found.difference == pytest.approx(float(change.norm()) / norm, rel=1e-4)
    retained.pop(name)
    with pytest.raises(ValueError, match="linears"):
        step_agreement.compare(result, new, retained, norm)


def test_floors_are_those_of_the_arithmetic():
    """LLaVA-1.5-7B on a device of 800 TFLOP/s in bfloat16, 55 in float32 and 3 TB/s."""
    shape = bench_step.WHOLE
    reduced = [
        step_ours.ReducedGram(layer, width, samples * shape.tokens, False)
        for samples in shape.samples for layer in range(shape.layers) for width in shape.gram_widths
    ]  # fmt: skip
    floors = step_floors.layer_floors_ms(shape, reduced, H100)
    totals = dict(zip(step_clock.PHASES, map(sum, zip(*floors, strict=True)), strict=True))
    expected = {"forward": 1.54e3 + 0.022e3, "Gram": 0.653e3, "inverse diagonals": 2 * 0.597e3, "scores": 8.63,
                "selection": 0, "merge": 12.95, "other": 0}  # fmt: skip
    assert totals == pytest.approx(expected, rel=0.01)
    assert step_floors.operations(shape) == pytest.approx(1.25e15 + 0.522e15 + 2 * 0.0328e15, rel=0.01)
    rows = [step_ours.ReducedGram(0, 4096, 1000, True), step_ours.ReducedGram(None, 4096, 1000, True)]
    first = dict(zip(step_clock.PHASES, step_floors.layer_floors_ms(shape, rows, H100)[0], strict=True))
    assert first["Gram"] == pytest.approx(1000 * 4096 * 2 * 2 / 3e9)
    assert first["inverse diagonals"] == pytest.approx(4.096e9 / 800e9 + (1e9 / 3 + 4.096e9) / 55e9)


def test_the_memory_plan_is_that_of_the_models():
    old = step_model.build(bench_step.WHOLE, torch.device("meta"), 0)
    parameters = sum(parameter.nbytes for parameter in old.parameters())
    linears = sum(weight.nbytes for weight in step_model.linear_weights(old).values())
    plan = step_model.memory_plan(bench_step.WHOLE)
    assert plan["models"] == pytest.approx(parameters + linears, rel=0.01)
    assert len(step_model.linear_weights(old)) == 224 and bench_step.WHOLE.image_tokens == 576
    assert plan["grams_peer"] == sum(4 * weight.shape[1] ** 2 for weight in step_model.linear_weights(old).values())
    assert step_model.needed_bytes(bench_step.WHOLE) == plan["models"] + plan["grams_peer"] + plan["work"]


def test_the_grams_are_those_of_the_plan(step):
    old, _, (safety, _), _ = step
    grams = hpa_ext.calibrate(old, safety, progress=False)
    held = sum(4 * gram.in_features**2 for gram in grams.distinct().values())
    assert held == step_model.memory_plan(SHAPE)["grams_ours"]


def test_as_many_layers_as_the_device_holds():
    whole = bench_step.WHOLE
    assert bench_step._fitting(whole, int(79e9)) == whole
    fewer = bench_step._fitting(whole, int(40e9))
    assert 1 < fewer.layers < 32 and step_model.needed_bytes(fewer) <= 0.95 * 40e9
    with pytest.raises(ValueError, match="step: one layer takes 7 GB"):
        bench_step._fitting(whole, int(1e9))


def test_tf32_is_allowed_for_the_peer_alone():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), bench_step._matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


def test_the_command_draws_and_prints_phases(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    options = ["--quick", "--threads", "1", "--repeats", "1", "--out", str(out), "--time-line", str(picture)]
    args = parser.parse_args(["bench", "step", *options])
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "inverse diagonals" in printed and "0 of 1120 columns decided otherwise" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = importlib.import_module(f"{benchmarks.__name__}.step_report")
    again = tmp_path / "again.svg"
    assert report.main([str(out), "--time-line", str(again)]) == 0
    assert capsys.readouterr().out.strip() in printed and again.stat().st_size > 0


@pytest.mark.parametrize(("op", "value"), [("gram", "x.png"), ("step", "x.txt")])
def test_bad_time_lines_are_refused(op, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", op, "--quick", "--no-save", "--time-line", value])
    assert args.run(args) == 2
    assert "--time-line: expected" in capsys.readouterr().err
