"""A picture of where a step's time goes: bars by phase for the whole, its floor and its peers, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Colours that stay apart for colour-blind readers (Okabe and Ito), by the order of the phases; the last for the rest.
_COLOURS = ("#56b4e9", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#bbbbbb")
_DARK = {"#0072b2", "#d55e00", "#009e73"}  # on which white text is read best
_METRIC = "step_vs_torch_"
_THICK, _THIN = 0.5, 0.22
_FEWEST_PERCENT_WITH_TEXT = 6


def steps(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each step in a results file: one for each peer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["metric"].startswith(_METRIC) and row.get("details"):
            found.setdefault(str(row["details"]["step"]), []).append(row)
    return list(found.values())


def by_phase(times: dict[str, Any]) -> list[float]:
    """Milliseconds by phase of all decoder layers and what is outside of them."""
    return [sum(column) for column in zip(*times["layers"], times["outside"], strict=True)]


def time_line(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """The last step among the rows of a results file.

    Above: the whole step as it was measured, its floor on that device (see ``benchmarks/step_floors.py``), and each
    peer. Below: each decoder layer, the thick bar measured and the thin, pale one under it the floor. A bar is cut by
    phase in their order, which is not the order in time: the forwards of two sets alternate with their factorisations.

    Args:
        rows: as in a results file, those of ``hpa-ext bench step`` with their `details` among them.
        title: of the whole.

    Raises:
        ValueError: there is no step among the rows.
    """
    found = steps(rows)
    if not found:
        raise ValueError("rows: expected one of hpa-ext bench step, got none")
    details = found[-1][0]["details"]
    phases, layers = details["phases"], details["ours"]["layers"]
    floors = details["floor_layers"]
    bars = [("ours", by_phase(details["ours"])), ("floor", [sum(column) for column in zip(*floors, strict=True)])]
    bars += [(row["peer"], by_phase(row["details"]["peer"])) for row in found[-1]]
    heights = [0.9 + 0.5 * len(bars), 1.2 + 0.36 * (len(layers) + 1)]
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=heights)
    _draw_wholes(above, bars)
    _draw_layers(below, layers, details["ours"]["outside"], floors)
    figure.suptitle(f"{title}\n{details['words']}", fontsize=10, x=0.01, ha="left")
    handles = [Patch(color=colour, label=phase) for phase, colour in zip(phases, _COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _draw_wholes(axes: Axes, bars: list[tuple[str, list[float]]]) -> None:
    """A bar for each, with its total beside it and the milliseconds of its longer parts inside."""
    scale, unit = _unit(max(sum(values) for _, values in bars))
    longest = max(sum(values) for _, values in bars) / scale
    for place, (_, values) in enumerate(bars):
        _stack(axes, place, [value / scale for value in values], _THICK, longest)
        axes.text(sum(values) / scale + 0.008 * longest, place, _number(sum(values) / scale), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlim(0, 1.09 * longest)
    axes.set_title("the whole step", loc="left", fontsize=9)
    _finish(axes, unit, len(bars))


def _draw_layers(
    axes: Axes, layers: list[list[float]], outside: list[float], floors: list[list[float]]
) -> None:  # fmt: skip
    scale, unit = _unit(max(map(sum, (*layers, outside))))
    longest = max(map(sum, (*layers, outside, *floors))) / scale
    for place, values in enumerate((*layers, outside)):
        _stack(axes, place - _THIN / 2, [value / scale for value in values], _THICK, longest)
    for place, values in enumerate(floors):
        _stack(axes, place + _THICK / 2, [value / scale for value in values], _THIN, longest, alpha=0.45)
    names = [f"layer {place + 1}" for place in range(len(layers))]
    axes.set_yticks(range(len(layers) + 1), [*names, "outside of the layers"], fontsize=8)
    axes.set_xlim(0, 1.02 * longest)
    axes.set_title("ours by decoder layer; thin and pale: the floor", loc="left", fontsize=9)
    _finish(axes, unit, len(layers) + 1)


def _stack(axes: Axes, place: float, values: list[float], height: float, longest: float, alpha: float = 1.0) -> None:
    left = 0.0
    for value, colour in zip(values, _COLOURS, strict=True):
        axes.barh(place, value, height, left=left, color=colour, alpha=alpha, linewidth=0)
        if height == _THICK and 100 * value >= _FEWEST_PERCENT_WITH_TEXT * longest:
            ink = "white" if colour in _DARK else "black"
            axes.text(left + value / 2, place, _number(value), ha="center", va="center", fontsize=7, color=ink)
        left += value


def _finish(axes: Axes, unit: str, lines: int) -> None:
    axes.set_ylim(lines - 0.4, -0.6)  # the first line is above
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _unit(milliseconds: float) -> tuple[float, str]:
    """Milliseconds in the unit of the axis, and its name."""
    return (1e3, "seconds") if milliseconds >= 2000 else (1.0, "milliseconds")


def _number(value: float) -> str:
    """Three significant digits, and all of them above a hundred."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
