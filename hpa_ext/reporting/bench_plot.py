"""A picture of how the cost of the operations grows with the features and with the tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_WORDS = {"in": "features"}


def growth(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Milliseconds over a size, a panel for each metric and size that takes at least two values, both axes logarithmic.

    Args:
        rows: as in a results file: `metric`, `shape`, `dimensions`, `dtype`, `ours_ms`, `peer_ms`, `ratio` and `peer`.
        title: of the whole.

    Raises:
        ValueError: no metric was measured at two sizes that differ in one dimension.

    The line is ours, the dashed one the peer, with the ratio of the two at each point.
    """
    panels = _panels(rows)
    if not panels:
        raise ValueError("rows: expected a metric at two sizes at least that differ in one dimension, got none")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * lines), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, panel in zip(
        figure.subplots(lines, columns, squeeze=False).flat, panels + [None] * columns, strict=False
    ):
        if panel is None:
            axes.set_visible(False)
        else:
            _draw(axes, *panel)
    return figure


def _panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, list[tuple[int, dict]]]]]:
    """``(metric, dimension, {what is held fixed: [(size, row)]})``; a series has at least two sizes."""
    found: dict[tuple[str, str], dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        names = row["dimensions"].split(", ")
        square = len(set(names)) == 1
        for index, name in enumerate(names[:1] if square else names):
            others = [(other, size) for other, size in zip(names, row["shape"], strict=True) if other != name]
            fixed = [f"{size} {_WORDS.get(other, other)}" for other, size in others]
            label = ", ".join([row["dtype"], *fixed])
            found[row["metric"], name][label].setdefault(row["shape"][index], row)
    panels = []
    for (metric, name), series in found.items():
        long = {label: sorted(points.items()) for label, points in series.items() if len(points) > 1}
        if long:
            panels.append((metric, name, long))
    return panels


def _draw(axes: Any, metric: str, dimension: str, series: dict[str, list[tuple[int, dict]]]) -> None:
    sizes = sorted({size for points in series.values() for size, _ in points})
    for colour, (label, points) in zip(_COLOURS * len(series), series.items(), strict=False):
        x = [size for size, _ in points]
        ours, peer = ([row[key] for _, row in points] for key in ("ours_ms", "peer_ms"))
        axes.plot(x, ours, color=colour, marker="o", ms=4, label=label)
        axes.plot(x, peer, color=colour, marker="o", ms=3, ls="--", lw=1, alpha=0.7)
        axes.fill_between(x, ours, peer, color=colour, alpha=0.06, lw=0)
        for size, mine, (_, row) in zip(x, ours, points, strict=True):
            axes.annotate(
                _times(row["ratio"]), (size, mine), (0, -11), textcoords="offset points", ha="center", fontsize=7,
                color=colour,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(_WORDS.get(dimension, dimension))
    axes.set_ylabel("milliseconds a call")
    peer_name = next(iter(series.values()))[0][1]["peer"]
    axes.set_title(f"{metric}\nsolid: ours; dashed: {peer_name}; at the points: its time over ours", fontsize=8.5)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"
