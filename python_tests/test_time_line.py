"""The picture and the table of a step's phases show the numbers that they were given."""

from __future__ import annotations

import importlib
import itertools
import json

import pytest
from matplotlib.colors import to_hex

from hpa_ext.cli import bench
from hpa_ext.reporting.time_line import steps, time_line

benchmarks = bench.load_benchmarks()
step_report = importlib.import_module(f"{benchmarks.__name__}.step_report")
PHASES = list(importlib.import_module(f"{benchmarks.__name__}.step_clock").PHASES)
OURS = [[400.0, 50, 90, 4, 0, 3, 0], [410.0, 45, 80, 5, 0, 2, 0]]
OUTSIDE = [30.0, 0, 2, 0, 9, 0, 1]
FLOORS = [[300.0, 40, 60, 3.5, 0, 2.5, 0], [300.0, 40, 61, 3.5, 0, 2.5, 0]]
PEERS = {
    "step_vs_torch_fp32": ([[400.0, 500, 600, 40, 5, 30, 0], [420.0, 510, 610, 41, 6, 31, 0]], [31.0, *[0] * 5, 7]),
    "step_vs_torch_tf32": ([[399.0, 200, 600, 42, 5, 30, 0], [401.0, 210, 610, 43, 6, 31, 0]], [32.0, *[0] * 5, 8]),
}  # fmt: skip


def times(layers, outside, scale=1.0):
    layers, outside = [[scale * value for value in layer] for layer in layers], [scale * value for value in outside]
    return {"layers": layers, "outside": outside, "total_ms": sum(map(sum, (*layers, outside)))}


def rows(scale=1.0, layers=2, peaks=None):
    found = []
    for metric, (peer_layers, peer_outside) in PEERS.items():
        ours, peer = times(OURS[:layers], OUTSIDE, scale), times(peer_layers[:layers], peer_outside, scale)
        details = {
            "step": {"layers": layers, "scale": scale}, "words": f"{layers} decoder layers", "phases": PHASES,
            "ours": ours, "peer": peer, "floor_layers": [[scale * v for v in floor] for floor in FLOORS[:layers]],
            "grams": 16, "grams_from_rows": 2, "peak_bytes": peaks,
            "agreement": {"columns": 9000, "differing_columns": 3, "linears": 14, "differing_linears": 2,
                          "difference": 1.5e-3},
            "memory_plan": {"models": 27e9, "grams_ours": 22e9, "grams_peer": 28e9, "work": 4e9},
        }  # fmt: skip
        peer_name = f"eager torch, {metric[-4:]}"
        found.append({"metric": metric, "peer": peer_name, "peer_ms": peer["total_ms"], "details": details})
    return found


def bars(axes):
    """``(middle, thickness): [(left, width, colour)]`` of the bars, from above to below."""
    found = {}
    for patch in axes.patches:
        key = (round(patch.get_y() + patch.get_height() / 2, 6), round(patch.get_height(), 6))
        found.setdefault(key, []).append((patch.get_x(), patch.get_width(), to_hex(patch.get_facecolor())))
    return dict(sorted(found.items()))


def widths(parts):
    return [width for _, width, _ in parts]


def sums(*layers):
    return [sum(column) for column in zip(*layers, strict=True)]


def test_bars_of_the_whole_are_as_long_as_the_data():
    above, _ = time_line(rows(0.5), "title").axes
    found = list(bars(above).values())
    ours = [0.5 * value for value in sums(*OURS, OUTSIDE)]
    peers = [[0.5 * value for value in sums(*layers, outside)] for layers, outside in PEERS.values()]
    expected = [ours, [0.5 * value for value in sums(*FLOORS)], *peers]
    assert [widths(parts) for parts in found] == [pytest.approx(values) for values in expected]
    for parts in found:  # one after the other
        assert [left for left, _, _ in parts] == pytest.approx([sum(widths(parts)[:n]) for n in range(len(parts))])
    assert [text.get_text() for text in above.get_yticklabels()] == [
        "ours", "floor", "eager torch, fp32", "eager torch, tf32",
    ]  # fmt: skip
    assert above.get_xlabel() == "milliseconds"
    assert above.yaxis_inverted(), "the first bar is above"
    totals = [
        text.get_text()
        for text in above.texts
        if text.get_position()[0] in [sum(v) + 0.008 * max(map(sum, expected)) for v in expected]
    ]
    assert totals == [f"{sum(values):.0f}" for values in expected]


def test_bars_of_the_layers_are_as_long_as_the_data():
    _, below = time_line(rows(0.5), "title").axes
    found = bars(below)
    thick = [widths(parts) for (_, height), parts in found.items() if height == 0.5]
    thin = [widths(parts) for (_, height), parts in found.items() if height == 0.22]
    assert thick == [pytest.approx([0.5 * value for value in values]) for values in (*OURS, OUTSIDE)]
    assert thin == [pytest.approx([0.5 * value for value in values]) for values in FLOORS]
    places = [(round(middle), height) for middle, height in found]
    assert places == [(0, 0.5), (0, 0.22), (1, 0.5), (1, 0.22), (2, 0.5)], "each floor lies under its layer"
    assert [text.get_text() for text in below.get_yticklabels()] == ["layer 1", "layer 2", "outside of the layers"]


def test_bars_do_not_lie_on_each_other():
    _, below = time_line(rows(), "title").axes
    edges = [(middle - height / 2, middle + height / 2) for middle, height in bars(below)]
    assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(edges))


def test_colours_are_those_of_the_legend():
    figure = time_line(rows(), "title")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == PHASES
    colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert len(set(colours)) == len(PHASES)
    for axes in figure.axes:
        for parts in bars(axes).values():
            assert [colour for _, _, colour in parts] == colours


def test_long_steps_are_in_seconds():
    above, below = time_line(rows(100), "title").axes
    assert (above.get_xlabel(), below.get_xlabel()) == ("seconds", "seconds")
    assert widths(next(iter(bars(above).values()))) == pytest.approx([value / 10 for value in sums(*OURS, OUTSIDE)])
    assert widths(next(iter(bars(below).values()))) == pytest.approx([value / 10 for value in OURS[0]])


def test_the_last_step_of_a_file_is_drawn():
    other = {"metric": "gram_vs_cast_matmul", "details": None}
    found = [*rows(layers=1), other, *rows()]
    assert [len(step) for step in steps(found)] == [2, 2]
    assert len(time_line(found, "title").axes[1].get_yticks()) == 3
    with pytest.raises(ValueError, match="expected one of hpa-ext bench step"):
        time_line([other, {"metric": "step_vs_torch_fp32"}], "title")


def test_the_table_says_what_was_measured():
    text = step_report.report(rows())
    lines = {line.split("  ")[0]: line.split()[-9:] for line in text.splitlines() if "%" in line}
    assert text.startswith("2 decoder layers\n")
    # Of the Gram: ours 95 ms, floor 80 ms, peers 1010 and 410 ms.
    total, floor = sum(map(sum, (*OURS, OUTSIDE))), sum(map(sum, FLOORS))
    assert lines["Gram"] == ["95", f"{95 / total:.0%}", "80", "15", "84%", "1,010", "10.6", "410", "4.3"]
    whole = [f"{total:,.0f}", "100%", f"{floor:,.0f}", f"{total - floor:.3g}", f"{floor / total:.0%}"]
    peers = [sum(map(sum, (*layers, outside))) for layers, outside in PEERS.values()]
    for peer in peers:
        whole += [f"{peer:,.0f}", f"{peer / total:.1f}"]
    assert lines["the whole step"] == whole
    own, rest = total - 840, peers[0] - 851  # less the forwards
    assert lines["without the forward"][5:7] == [f"{rest:,.0f}", f"{rest / own:.1f}"]
    assert lines["without the forward"][:4] == [f"{own:,.0f}", f"{own / total:.0%}", f"{floor - 600:,.0f}", "78"]
    assert "Ours by decoder layer: 542 to 547 ms, median 544; outside of the layers 42 ms." in text
    assert "Against eager torch, fp32: 3 of 9000 columns decided otherwise, in 2 of 14 linears" in text
    assert "16 Grams of distinct inputs were factored, 2 of them" in text
    assert "Most memory" not in text
    assert "ours 50 GB, eager torch, tf32 57 GB" in step_report.report(rows(peaks={"ours": 50e9, "peer": 57e9}))
    assert step_report.report([{"metric": "gram_vs_cast_matmul", "details": None}]) == ""


def test_a_file_without_a_step_is_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": []}))
    assert step_report.main([str(path)]) == 1
    assert "expected rows of step_vs_torch_fp32" in capsys.readouterr().err


def test_the_document_has_the_table_of_its_results_file():
    document = importlib.import_module(f"{benchmarks.__name__}.step_document")
    text = document.DOCUMENT.read_text(encoding="utf-8")
    path = document.source(text)
    known = json.loads(path.read_text(encoding="utf-8"))
    assert document.updated(text, path.name, known) == text, "run `python -m benchmarks.step_document`"
    assert (document.DOCUMENT.parent / "performance" / document.PICTURE.name).stat().st_size > 0
    known["rows"][-1]["details"]["ours"]["layers"][0][0] += 1000
    assert document.updated(text, path.name, known) != text
    with pytest.raises(ValueError, match="expected the marks"):
        document.source("no marks")
