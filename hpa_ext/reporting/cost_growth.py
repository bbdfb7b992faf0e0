"""A picture of how cost grows: measured points, the model's lines, and the slopes between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_COLUMNS = 3
_UNITS = {"seconds": ("milliseconds", 1e3), "bytes": ("MiB beyond the interpreter", 2**-20)}

Panel = tuple[str, str, dict[str, list[dict[str, Any]]]]


def cost_growth(points: Sequence[dict[str, Any]], title: str) -> Figure:
    """Cost over a size, both axes logarithmic: a panel for each phase and variable, a colour for each series.

    Args:
        points: as `benchmarks.cost_growth` writes them: `phase`, `series`, `variable`, `value`, `measured`,
            `predicted`, `unit` ("seconds" or "bytes").
        title: of the whole.

    Raises:
        ValueError: no series has two points.

    Dots are measured, the line is the model. At the end of each series stands the slope of the measured points: the
    power of the size that the cost grows with, between the last two.
    """
    panels = _panels(points)
    if not panels:
        raise ValueError("points: expected a series of two points at least, got none")
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\ndots: measured; lines: model; at the end: slope between the last two", fontsize=10)
    shown = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(shown, panels + [None] * columns, strict=False):
        if panel is None:
            axes.set_visible(False)
        else:
            _draw(axes, *panel)
    return figure


def _panels(points: Sequence[dict[str, Any]]) -> list[Panel]:
    """``(phase, variable, {series: points by size})``, of series that have two points at least."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        found[point["phase"], point["variable"]][point["series"]].append(point)
    panels = []
    for (phase, variable), series in found.items():
        long = {
            label: sorted(members, key=lambda point: point["value"])
            for label, members in series.items()
            if len({point["value"] for point in members}) > 1
        }
        if long:
            panels.append((phase, variable, long))
    return panels


def slope(points: Sequence[dict[str, Any]]) -> float:
    """Of the last two measured points, in logarithms of both."""
    first, last = points[-2:]
    return math.log(last["measured"] / first["measured"]) / math.log(last["value"] / first["value"])


def _draw(axes: Any, phase: str, variable: str, series: dict[str, list[dict[str, Any]]]) -> None:
    unit, factor = _UNITS[next(iter(series.values()))[0]["unit"]]
    for colour, (label, points) in zip(_COLOURS * len(series), series.items(), strict=False):
        x = [point["value"] for point in points]
        measured, predicted = ([factor * point[key] for point in points] for key in ("measured", "predicted"))
        axes.plot(x, predicted, color=colour, lw=1.2, alpha=0.8)
        axes.plot(x, measured, color=colour, marker="o", ms=4.5, ls="", label=label)
        axes.annotate(
            f"{slope(points):.1f}", (x[-1], measured[-1]), (7, -2), textcoords="offset points", fontsize=8, color=colour
        )
    sizes = sorted({point["value"] for points in series.values() for point in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(variable, fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.set_title(f"{phase}, over {variable}", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left")


def _apart(sizes: Sequence[float]) -> list[float]:
    """The sizes whose labels do not run into each other."""
    kept: list[float] = []
    for size in sizes:
        if not kept or size >= 1.5 * kept[-1]:
            kept.append(size)
    return kept
