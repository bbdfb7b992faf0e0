"""The benchmark of how cost grows, its table and its picture."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from hpa_ext.cli import bench
from hpa_ext.reporting.cost_growth import cost_growth, slope

bench.load_benchmarks()
benchmark, cost_inputs, cost_layers, cost_runs, cost_point = (
    importlib.import_module(f"hpa_ext.benchmarks.{name}")
    for name in ("cost_growth", "cost_inputs", "cost_layers", "cost_runs", "cost_point")
)
Point = cost_point.Point


def curve(phase: str, power: float, factor: float = 1.0, unit: str = "seconds") -> list[Point]:
    return [
        Point(phase, "a series", "width", size, 1e-9 * size**power, factor * 1e-9 * size**power, unit)
        for size in (100, 200, 400)
    ]


@pytest.fixture
def phases(monkeypatch):
    made = {"one": lambda directory: curve("one", 3.0), "two": lambda directory: curve("two", 2.0, 0.5, "bytes")}
    monkeypatch.setattr(benchmark, "PHASES", made)
    return made


def test_points_gather_in_the_file_and_stay_until_measured_again(phases, tmp_path, capsys):
    out, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    common = ["--out", str(out), "--scratch", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert benchmark.main(["--only", "two", *common]) == 0
    assert benchmark.main(["--only", "one", "--plot", str(picture), *common]) == 0
    document = json.loads(out.read_text())
    assert [point["phase"] for point in document["points"]] == ["one"] * 3 + ["two"] * 3
    assert document["accuracy"]["seconds"] == {"median": 1.0, "worst": 1.0, "points": 3}
    assert document["accuracy"]["bytes"] == {"median": 2.0, "worst": 2.0, "points": 3}
    assert picture.stat().st_size > 10_000 and document["device"]
    printed = capsys.readouterr().out
    assert "3.00" in printed and "2.00" in printed  # slopes; and measured over predicted
    phases["two"] = lambda directory: curve("two", 1.0, unit="bytes")
    assert benchmark.main(["--only", "two", *common]) == 0
    again = json.loads(out.read_text())
    assert len(again["points"]) == 6 and again["accuracy"]["bytes"]["worst"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "growth.png"]
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "three", *common])


def test_a_file_is_of_one_machine_and_is_read_without_being_changed(phases, tmp_path, capsys):
    out = tmp_path / "growth.json"
    common = ["--out", str(out), "--threads", str(torch.get_num_threads())]
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "", *common])
    assert benchmark.main(common) == 0
    before = out.read_text()
    capsys.readouterr()
    assert benchmark.main(["--only", "", *common]) == 0
    assert out.read_text() == before
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"all of seconds 3 1.00 1.00", "all of bytes 3 2.00 2.00"} <= lines
    for key, value in (("device", "Another"), ("threads", 99)):
        out.write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(SystemExit):
            benchmark.main(["--only", "one", *common])
        assert "--out: expected a file of" in capsys.readouterr().err


def test_too_high_and_too_low_predictions_count_alike():
    found = benchmark.Accuracy.of([Point("", "", "", 1, 1.0, 4.0), Point("", "", "", 1, 3.0, 1.0)])
    assert (found.median, found.worst, found.points) == (3.5, 4.0, 2)


def test_the_picture_has_the_measured_points_the_model_and_the_slopes():
    points = [vars(point) for point in curve("one", 2.5, 0.5) + curve("two", 1.0, unit="bytes")]
    points.append(vars(Point("alone", "x", "rank", 1, 1.0, 1.0)))
    axes = [one for one in cost_growth(points, "here").axes if one.get_visible()]
    assert len(axes) == 2  # a single point is no curve
    model, measured = axes[0].get_lines()
    assert list(measured.get_xdata()) == [100, 200, 400]
    assert list(measured.get_ydata()) == pytest.approx([1e3 * 1e-9 * size**2.5 for size in (100, 200, 400)])
    assert list(model.get_ydata()) == pytest.approx([0.5 * value for value in measured.get_ydata()])
    assert [text.get_text() for text in axes[0].texts] == ["2.5"] and [t.get_text() for t in axes[1].texts] == ["1.0"]
    assert axes[0].get_xscale() == axes[0].get_yscale() == "log"
    assert axes[0].get_ylabel().startswith("milliseconds") and axes[1].get_ylabel().startswith("MiB")
    assert slope(points[:3]) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="points: expected a series"):
        cost_growth(points[:1], "here")


def test_layers_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(cost_layers, "_WIDTHS", (64, 128))
    monkeypatch.setattr(cost_layers, "_CALIBRATIONS", ((64, 1, 1, "width"), (64, 2, 1, "layers"), (64, 1, 2, "tokens")))
    for phase in (
        cost_layers.gram,
        cost_layers.inverse_diagonal,
        cost_layers.harmonize_widths,
        cost_layers.calibration,
    ):
        points = list(phase(tmp_path))
        assert len(points) >= 2 and all(point.measured > 0 and point.predicted > 0 for point in points)


def test_runs_are_measured_against_their_plans(monkeypatch, tmp_path):
    for name, value in (("_LAYERS", (1,)), ("_WIDTHS", (64,)), ("_RANKS", (2,)), ("_NARROW", 64), ("_RANK", 2)):
        monkeypatch.setattr(cost_runs, name, value)
    points = [*cost_runs.checkpoint(tmp_path / "a"), *cost_runs.adapter(tmp_path / "b")]
    assert {point.variable for point in points} == {"layers", "width", "rank"}
    assert all(point.measured > 0 and point.predicted > 0 for point in points)
    assert not list(tmp_path.glob("*/out*"))


def test_inputs_have_the_shapes_that_were_asked_for(tmp_path):
    from hpa_ext import GramFile
    from hpa_ext.checkpoints.reader import CheckpointReader

    made = cost_inputs.make_inputs(tmp_path / "made", 128, 2, (4,))
    with CheckpointReader(made.new) as reader:
        assert len([name for name in reader.entries if "language_model" in name and "_proj.weight" in name]) == 14
    with GramFile(made.safety) as grams:
        assert len(grams) == 14 and len(grams.groups) == 8
        assert {grams.in_features(name) for name in grams} == {128, cost_inputs.inner_width(128)}


def test_the_document_says_what_the_rows_say():
    folder = Path(__file__).resolve().parent.parent / "docs"
    if not folder.is_dir():
        pytest.skip("the documentation is not installed")
    text = " ".join((folder / "costs.md").read_text(encoding="utf-8").split())
    document = json.loads((folder / "costs" / "growth.json").read_text(encoding="utf-8"))
    points = [Point(**point) for point in document["points"]]
    found = {kind: benchmark.Accuracy.of(p for p in points if p.unit == kind) for kind in ("seconds", "bytes")}
    time, memory = found["seconds"], found["bytes"]
    assert f"{time.points} points of time and {memory.points} of memory" in text
    assert f"a factor of {time.median:.2f} in the median and {time.worst:.2f} at worst for time" in text
    assert f"{memory.median:.2f} and {memory.worst:.2f} for memory" in text
    for kind, belongs in benchmark.KINDS.items():
        one = benchmark.Accuracy.of(point for point in points if belongs(point))
        (line,) = [
            line for line in (folder / "costs.md").read_text(encoding="utf-8").splitlines() if f"| {kind}" in line
        ]
        assert line.endswith(f"| {one.points} | {one.median:.2f} | {one.worst:.2f} |")
    assert (folder / "costs" / "growth.png").is_file()
    assert {point.phase for point in points} == set(benchmark.PHASES)
