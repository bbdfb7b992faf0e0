"""What is computed and written from rows of the continual benchmark: tables, differences, sentences, the page."""

from __future__ import annotations

import json
import math
import re

import pytest
from continual_rows import made_row
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from hpa_ext.reporting.continual import main_table, write_report, write_tables
from hpa_ext.reporting.continual_pairs import Difference, differences
from hpa_ext.reporting.continual_plots import trade_off
from hpa_ext.reporting.continual_tables import cell, markdown, paired_table, summaries, summary_lines, tuning_lines
from hpa_ext.reporting.continual_verdict import front, verdict
from hpa_ext.reporting.labels import Label, place_labels


def _rows(name: str, **columns: tuple[float, ...]) -> list[dict]:
    """Rows of the seeds 1, 2, ... with these values."""
    count = len(next(iter(columns.values())))
    return [
        made_row(name, seed + 1, 50.0, **{key: values[seed] for key, values in columns.items()})
        for seed in range(count)
    ]


def test_tables_hold_means_and_intervals() -> None:
    rows = [made_row("seqft", seed, ap) for seed, ap in ((1, 10.0), (2, 20.0), (3, 30.0))] + [made_row("hpa", 1, 50.0)]
    first, second = summaries(rows)
    assert (first.title, second.title) == ("SeqFT", "HPA")
    assert cell(first.values["AP"]) == "20.0 ± 24.8"  # 4.303 * 10 / sqrt(3)
    assert cell(second.values["AP"]) == "50.0"
    assert "20.0 ± 24.8" in main_table(rows)
    assert markdown(*summary_lines([first])).splitlines()[-1].startswith("| SeqFT | 20.0 ± 24.8 |")


def test_bounds_stand_first_and_hpa_before_its_variants() -> None:
    names = ["ewc", "hpa-product", "wise-ft", "hpa", "multi-task", "seqft"]
    found = [item.method for item in summaries([made_row(name, 1, 10.0) for name in names])]
    assert found == ["multi-task", "seqft", "hpa", "hpa-product", "wise-ft", "ewc"]


def test_differences_are_taken_seed_by_seed() -> None:
    rows = _rows("seqft", AP=(10.0, 50.0, 90.0), MASR=(40.0, 40.0, 40.0)) + _rows(
        "hpa", AP=(12.0, 53.0, 91.0), MASR=(30.0, 50.0, 40.0)
    )
    found = differences(rows, "hpa", "seqft")
    # Differences 2, 3, 1: mean 2, deviation 1, so 4.303 / sqrt(3); the seeds' own spread of 40 points is not in it.
    assert found["AP"].mean == pytest.approx(2.0)
    assert found["AP"].half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert not found["AP"].is_better
    assert not found["MASR"].is_better
    assert not found["MASR"].is_worse
    assert differences(rows[:2], "hpa", "seqft") == {}
    # A seed that one of them lacks does not count.
    assert differences([*rows, made_row("hpa", 9, 99.0)], "hpa", "seqft") == found


@pytest.mark.parametrize(
    ("mean", "half", "direction", "better", "worse"),
    [(3, 2, 1, True, False), (-3, 2, 1, False, True), (-3, 2, -1, True, False), (3, 4, 1, False, False)],
)
def test_a_difference_is_decided_where_its_interval_does_not_hold_0(mean, half, direction, better, worse) -> None:
    found = Difference(mean, half, direction)
    assert (found.is_better, found.is_worse) == (better, worse)


def test_one_seed_decides_nothing() -> None:
    found = Difference(50.0, math.nan, 1)
    assert not found.is_better
    assert not found.is_worse
    assert str(found) == "+50.0"


def test_the_paired_table_marks_what_is_decided() -> None:
    rows = _rows("seqft", AP=(10.0, 20.0, 30.0)) + _rows("hpa", AP=(15.0, 25.1, 35.0))
    header, lines = paired_table(rows)
    assert header == ["method", "AP", "BWT", "MASR", "learning"]
    assert len(lines) == 1
    assert re.fullmatch(r"\+5\.0 ± 0\.1 \*", lines[0][1])
    assert lines[0][2] == "+0.0 ± 0.0"
    assert paired_table(_rows("hpa", AP=(1.0,)))[1] == []


def test_the_front_holds_those_that_nobody_surpasses() -> None:
    rows = [
        made_row("wise-ft", 1, 70.0, MASR=10.0),
        made_row("dare", 1, 60.0, MASR=20.0),  # less AP and less safe than wise-ft
        made_row("hpa", 1, 80.0, MASR=30.0),
        made_row("ewc", 1, 50.0, MASR=0.0),
    ]
    assert [item.method for item in front(summaries(rows))] == ["ewc", "wise-ft", "hpa"]


@pytest.mark.parametrize(("key", "places"), [("AP", {70.0, 60.0}), ("BWT", {-5.0, -25.0})])
def test_the_picture_has_the_value_that_it_is_asked_for(key: str, places: set[float]) -> None:
    rows = [made_row("wise-ft", 1, 70.0, BWT=-5.0, MASR=10.0), made_row("dare", 1, 60.0, BWT=-25.0, MASR=20.0)]
    axes = trade_off(rows, "title", key).axes[0]
    points = [line for line in axes.lines if line.get_marker() in ("s", "o", "P", "^", "D")]
    assert {float(line.get_xdata()[0]) for line in points} == places
    assert axes.get_xlabel().startswith(f"{key}:")
    edge = next(line for line in axes.lines if line.get_linewidth() == 6)  # wise-ft surpasses dare in both
    assert list(edge.get_xdata()) == [max(places)]


def test_the_verdict_follows_the_rows() -> None:
    one = {"AP": (60.0, 61.0, 62.0), "BWT": (-20.0, -21.0, -22.0), "MASR": (30.0, 31.0, 32.0)}
    rows = _rows("hpa", **one)
    rows += _rows("seqft", AP=(50.0, 51.0, 52.0), BWT=(-30.0, -31.0, -32.0), MASR=(40.0, 41.0, 42.0))
    rows += _rows("ewc", AP=(90.0, 91.0, 92.0), BWT=(-1.0, -2.0, -3.0), MASR=(1.0, 2.0, 3.0))
    rows += _rows("dare", AP=(59.0, 70.0, 62.0), BWT=(-20.0, -20.0, -21.0), MASR=(30.0, 31.0, 30.0))
    rows += _rows("wise-ft", AP=(9.0, 9.0, 9.0), BWT=(-90.0, -90.0, -90.0), MASR=(99.0, 99.0, 99.0))
    text = "\n".join(verdict(rows))
    assert "then answers 41 % of the harmful prompts" in text
    assert "AP +10.0 ± 0.0 (better)" in text
    assert "outside the intervals: EWC." in text
    assert "in all three by the means: DARE." in text
    assert "Behind it in all three by the means: WiSE-FT." in text
    assert "than: EWC." in text
    swapped = [row | {"method": {"hpa": "ewc", "ewc": "hpa"}.get(row["method"], row["method"])} for row in rows]
    assert "outside the intervals: none." in "\n".join(verdict(swapped))


def test_the_page_and_the_tables_hold_every_condition(tmp_path) -> None:
    rows = [made_row(name, seed, 40.0 + seed) for name in ("seqft", "hpa", "hpa-both") for seed in (1, 2)]
    rows += [made_row(name, 1, 30.0, "injected") for name in ("seqft", "hpa")]
    layers = {"columns": [10] * 7, "retained": [1] * 7, "safety": [2] * 7, "shared": [1] * 7, "alpha": [0.5] * 7}
    for row in rows:
        if row["method"] == "hpa":
            row["steps"][0] |= {"layers": layers, "safety_left": 0.7, "task_lost": 0.1}
    page = write_report(rows, tmp_path).read_text(encoding="utf-8")
    stems = ("trade-off", "forgetting", "by-step", "output-change", "by-layer")
    expected = {f"{stem}-{condition}-1.png" for stem in stems for condition in ("original", "injected")}
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    assert page.count("data:image/png;base64,") == len(expected)
    assert "http" not in page
    for text in ("Parts of HPA", "Minus SeqFT", "Minus HPA", "hpa-refusals-1", "0.1 % harmful data injected, order 1"):
        assert text in page
    tables = write_tables(rows, tmp_path).read_text(encoding="utf-8")
    assert tables.count("## original data, order 1") == 1
    assert tables.count("### Parts of HPA") == 1  # the injected rows have none
    assert "| HPA | 41.5 ± 6.4 |" in tables
    json.dumps(rows)
    with pytest.raises(ValueError, match="rows"):
        write_report([], tmp_path)


def test_labels_of_close_points_cover_neither_points_nor_each_other() -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(50 + place % 3, 50 + place // 3) for place in range(6)] + [(0, 0), (100, 100)]
    axes.plot(*zip(*points, strict=True), "o", ms=5)
    place_labels(axes, [Label(f"a method {place}", x, y, "black") for place, (x, y) in enumerate(points)])
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(note, renderer) for note in axes.texts]
    frame = axes.get_window_extent(renderer)
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_the_tuning_table_marks_what_was_taken() -> None:
    tried = [
        {"value": value, "AP": ap, "BWT": None, "learning": 90.0, "MASR": 5.0}
        for value, ap in ((0.2, 10.0), (0.4, 70.0))
    ]
    header, lines = tuning_lines({"wise-ft": {"strength": "share", "chosen": 0.4, "tried": tried}})
    assert len(header) == 6
    assert lines == [
        ["WiSE-FT, `share`", "0.2", "10.0", "–", "90.0", "5.0"],
        ["", "0.4 *", "70.0", "–", "90.0", "5.0"],
    ]
