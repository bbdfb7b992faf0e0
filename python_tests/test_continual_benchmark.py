"""The continual benchmark run small: rows, caches, resuming, tuning, the command line and the report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from continual_rows import made_row

from hpa_ext.baselines import METHODS, method
from hpa_ext.baselines.registry import Method
from hpa_ext.cli import bench_continual
from hpa_ext.continual import cells as cells_module
from hpa_ext.continual.cells import Cell, cells, import_rows, read_row, run_cells, write_results
from hpa_ext.continual.sequence import run_sequence
from hpa_ext.continual.settings import ContinualSettings, mini_settings
from hpa_ext.continual.tuning import tune, tuning_cells
from hpa_ext.reporting.continual import main_table, write_report

FIELDS = {
    "method", "seed", "condition", "order", "AP", "BWT", "Avg", "Last", "MASR", "DASR", "learning", "seconds", "config",
}  # fmt: skip


def _quiet(text: str) -> None:
    """Nothing is printed."""


def _one_task() -> ContinualSettings:
    return ContinualSettings(**{**mini_settings().to_dict(), "tasks": 1, "max_steps": 2})


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Rows of a few methods under both conditions, one seed."""
    out = tmp_path_factory.mktemp("continual")
    run_cells(cells(["zero-shot", "seqft", "hpa", "ewc"], [3], ["original"], [1]), mini_settings(), out, _quiet)
    run_cells(cells(["seqft", "hpa", "hpa-both"], [3], ["injected"], [1]), mini_settings(), out, _quiet)
    return out


def _row(directory: Path, name: str, condition: str = "original") -> dict:
    return read_row(Cell(name, 3, condition).path(directory, mini_settings()))


def test_a_row_holds_what_is_promised(directory) -> None:
    for name in ("zero-shot", "seqft", "hpa", "ewc"):
        row = _row(directory, name)
        assert set(row) >= FIELDS
        assert row["config"]["regime"] == mini_settings().to_dict()
        assert set(row["steps"][-1]["asr"]) == {"text", "image", "both"}
        assert row["DASR"] == pytest.approx(row["MASR"] - sum(row["initial_asr"].values()) / 3)
    assert len(_row(directory, "seqft")["steps"]) == 2
    assert _row(directory, "zero-shot")["BWT"] is None
    assert len(_row(directory, "hpa")["steps"][0]["layers"]["alpha"]) == 28
    assert _row(directory, "hpa")["method_mb"] > 0
    assert _row(directory, "hpa")["method_seconds"] > 0


def test_what_is_done_is_not_run_again(directory, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a finished sequence was run again")

    monkeypatch.setattr(cells_module, "run_sequence", refuse)
    wanted = cells(["zero-shot", "seqft", "hpa", "ewc"], [3], ["original"], [1])
    assert [row["method"] for row in run_cells(wanted, mini_settings(), directory, _quiet)] == [
        "zero-shot", "seqft", "hpa", "ewc",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="run again"):  # another regime, strength or seed is another sequence
        run_cells(wanted, ContinualSettings(tasks=2), directory, _quiet)
    with pytest.raises(AssertionError, match="run again"):
        run_cells([Cell("ewc", 3, "original", strength=5.0)], mini_settings(), directory, _quiet)


def test_rows_of_another_directory_are_taken_where_they_fit(directory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells_module, "run_sequence", lambda *args, **kwargs: pytest.fail("run again"))
    source = write_results([_row(directory, "seqft"), _row(directory, "hpa")], tmp_path / "old")
    assert import_rows(source, tmp_path / "new") == 2
    assert import_rows(source, tmp_path / "new") == 0
    wanted = cells(["seqft", "hpa"], [3], ["original"], [1])
    assert run_cells(wanted, mini_settings(), tmp_path / "new", _quiet) == json.loads(source.read_text())
    source.write_text("[{}]")
    with pytest.raises(ValueError, match="digest"):
        import_rows(source, tmp_path / "new")


def test_an_interrupted_sequence_leaves_no_row_and_no_claim(tmp_path, monkeypatch) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells_module, "run_sequence", interrupt)
    wanted = [Cell("seqft", 3, "original")]
    with pytest.raises(KeyboardInterrupt):
        run_cells(wanted, mini_settings(), tmp_path, _quiet)
    assert read_row(wanted[0].path(tmp_path, mini_settings())) is None
    monkeypatch.setattr(cells_module, "run_sequence", lambda *args, **kwargs: made_row("seqft", 3, 1.0))
    assert len(run_cells(wanted, mini_settings(), tmp_path, _quiet)) == 1


def test_a_sequence_that_another_process_runs_is_left_to_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells_module, "run_sequence", lambda *args, **kwargs: pytest.fail("it is taken"))
    path = Cell("seqft", 3, "original").path(tmp_path, mini_settings())
    with cells_module._claimed(path) as mine:
        assert mine
        assert run_cells([Cell("seqft", 3, "original")], mini_settings(), tmp_path, _quiet) == []


def test_the_shared_first_step_gives_the_same_row(directory, tmp_path) -> None:
    cached = _row(directory, "hpa")  # seqft made the first step that hpa took
    assert len(list((directory / "cache").glob("first-step-3-original*"))) == 1
    alone = run_sequence(method("hpa"), 3, "original", 1, mini_settings())
    assert [step["scores"] for step in alone["steps"]] == [step["scores"] for step in cached["steps"]]
    assert alone["steps"][0]["layers"] == cached["steps"][0]["layers"]
    assert alone["steps"][1]["training_loss"] == pytest.approx(cached["steps"][1]["training_loss"], rel=1e-6)


def test_the_weights_are_those_of_the_method(monkeypatch) -> None:
    seen = {}

    def zeros(old, new, layer):
        seen[layer.name] = (old, new, layer.depth)
        return torch.zeros_like(new)

    made = Method("zeros", "Zeros", "post-training", zeros, "a test")
    models = []
    monkeypatch.setattr(
        "hpa_ext.continual.sequence.evaluate",
        lambda model, *args: (
            models.append(model) or {"scores": [0.0] * len(args[1]), "masr": 0.0, "asr": {}, "refusals": ""}
        ),
    )
    run_sequence(made, 3, "original", 1, _one_task())
    assert len(seen) == 28
    last = models[-1]
    assert all(bool((last.get_submodule(name).weight == 0).all()) for name in seen)
    assert sorted({depth for _, _, depth in seen.values()}) == [0.25, 0.5, 0.75, 1.0]
    assert any(not torch.equal(old, new) for old, new, _ in seen.values())


def test_task_vectors_are_all_tuned_from_the_initial_weights() -> None:
    starts: dict[str, list] = {}

    def spy(old, new, layer):
        starts.setdefault(layer.name, []).append(old)
        assert torch.equal(old, layer.initial)
        assert len(layer.earlier_updates) == len(starts[layer.name]) - 1
        return new + 1

    made = Method("spy", "Spy", "post-training", spy, "a test", needs=("history",))
    settings = ContinualSettings(**{**_one_task().to_dict(), "tasks": 2})
    run_sequence(made, 3, "original", 1, settings)
    assert all(len(found) == 2 and torch.equal(*found) for found in starts.values())


def test_an_error_of_a_method_names_the_module() -> None:
    def fails(old, new, layer):
        raise ValueError("this is wrong")

    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: this is wrong"):
        run_sequence(Method("fails", "F", "post-training", fails, ""), 3, "original", 1, _one_task())


def test_tuning_takes_the_value_with_the_largest_distance(tmp_path, monkeypatch) -> None:
    gives = {0.2: (50, 10), 0.4: (70, 20), 0.6: (80, 60), 0.8: (90, 95)}

    def fake(found, seed, condition, order, settings, strength=None, changes=None, cache=None, say=None):
        assert seed in (100, 101)
        assert settings.steps == 2
        ap, masr = gives[strength]
        row = made_row(found.name, seed, ap) | {"MASR": masr}
        return row | {"config": {"method": {found.strength: strength}, "regime": {}}}

    monkeypatch.setattr(cells_module, "run_sequence", fake)
    assert len(tuning_cells(["wise-ft", "hpa"], (100, 101))) == 8
    found = tune(["wise-ft", "hpa"], mini_settings(), tmp_path, (100, 101), _quiet)
    assert set(found) == {"wise-ft"}
    assert found["wise-ft"]["chosen"] == 0.4
    assert len(found["wise-ft"]["tried"]) == 4


# --- the command line -----------------------------------------------------------------------------------------------
def _command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench_continual.add_arguments(parser)
    return bench_continual.run(parser.parse_args(arguments))


def test_the_command_writes_results_and_takes_a_method_file(tmp_path, capsys) -> None:
    path = tmp_path / "keep.py"
    path.write_text(
        "from hpa_ext.baselines import post_training\n"
        "@post_training('keep-old', 'Keep old', 'a test')\n"
        "def keep_old(old, new, layer):\n"
        "    return old\n"
    )
    try:
        out = tmp_path / "out"
        arguments = ["--mini", "--seeds", "7", "--methods", "keep-old,seqft", "--condition", "injected"]
        assert _command(*arguments, "--out", str(out), "--method-file", str(path)) == 0
    finally:
        METHODS.pop("keep-old", None)
    rows = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in rows] == ["keep-old", "seqft"]
    assert all(set(row) >= FIELDS and row["seed"] == 7 and row["condition"] == "injected" for row in rows)
    assert rows[0]["MASR"] == 0.0  # nothing was changed, so nothing was lost
    assert (out / "report.html").is_file()
    assert "Keep old" in (out / "tables.md").read_text()
    assert "Keep old" not in main_table(rows[1:])
    assert "rows in" in capsys.readouterr().out


def test_the_command_refuses_unknown_names(tmp_path) -> None:
    with pytest.raises(ValueError, match="method: expected one of"):
        _command("--mini", "--methods", "nothing", "--out", str(tmp_path))
    with pytest.raises(ValueError, match="order: expected one of"):
        _command("--mini", "--methods", "seqft", "--order", "3", "--out", str(tmp_path))
    with pytest.raises(ValueError, match="no rows"):
        _command("--mini", "--report-only", "--methods", "seqft", "--out", str(tmp_path))
    with pytest.raises(SystemExit):
        _command("--seeds", "one")


def test_a_setting_of_the_regime_can_be_changed(tmp_path) -> None:
    out = str(tmp_path / "out")
    assert _command("--mini", "--methods", "zero-shot", "--seeds", "3", "--out", out, "--set", "test_count=4") == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())[0]
    assert row["config"]["regime"] == mini_settings().changed(test_count=4).to_dict()
    assert row["config"]["regime"] != mini_settings().to_dict()
    with pytest.raises(ValueError, match=r"regime: expected one of tasks, .*, got 'colour'"):
        _command("--mini", "--out", out, "--set", "colour=red")
    with pytest.raises(TypeError, match="test_count: expected int, got 'many'"):
        _command("--mini", "--out", out, "--set", "test_count=many")
    with pytest.raises(ValueError, match="calibration_tokens: expected one of all"):
        _command("--mini", "--out", out, "--set", "calibration_tokens=some")
    with pytest.raises(SystemExit):
        _command("--set", "test_count")


def test_a_setting_of_a_method_can_be_changed(tmp_path) -> None:
    out, words = tmp_path / "out", ["--methods", "compromise-earlier", "--seeds", "3", "--out"]
    assert _command("--mini", *words, str(out), "--set", "tasks=1", "--set", "max_steps=2",
                    "--option", "earlier_strength=0.3", "--option", "memory=diagonal") == 0  # fmt: skip
    row = json.loads((out / "results.json").read_text())[0]
    assert row["config"]["method"]["earlier_strength"] == 0.3
    assert row["config"]["method"]["memory"] == "diagonal"
    small = mini_settings().changed(tasks=1, max_steps=2)
    changed = Cell("compromise-earlier", 3, "original", changes=(("earlier_strength", 0.3), ("memory", "diagonal")))
    assert row["digest"] == changed.digest(small) != Cell("compromise-earlier", 3, "original").digest(small)
    with pytest.raises(ValueError, match=r"compromise-earlier: expected settings among strength, .*, got 'colour'"):
        _command("--mini", *words, str(out), "--option", "colour=red")
    with pytest.raises(ValueError, match="seqft: expected settings among none, got 'damping'"):
        _command("--mini", "--methods", "seqft", "--out", str(out), "--option", "damping=1")
    with pytest.raises(ValueError, match="--option: has no part in --tune"):
        _command("--mini", *words, str(out), "--option", "damping=1", "--tune")


def test_the_calibration_tokens_decide_the_grams() -> None:
    counts = []

    def spy(old, new, layer):
        counts.append(layer.safety.token_count)
        return new

    made = Method("spy", "Spy", "post-training", spy, "a test")
    for tokens in ("attended", "response"):
        run_sequence(made, 3, "original", 1, _one_task().changed(calibration_tokens=tokens))
    assert 0 < counts[-1] < counts[0]


def test_the_command_lists_the_methods(capsys) -> None:
    assert _command("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["original", "injected"])
def test_every_method_runs(condition: str, tmp_path) -> None:
    rows = run_cells(cells(METHODS, [3], [condition], [2]), mini_settings(), tmp_path, _quiet)
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(0 <= row["AP"] <= 100 and 0 <= row["MASR"] <= 100 for row in rows)
    assert write_report(rows, tmp_path).stat().st_size > 10_000
