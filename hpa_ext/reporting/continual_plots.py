"""Pictures of the continual benchmark; each function draws one figure and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hpa_ext.baselines import METHODS

from .continual_tables import Summary, summaries
from .continual_verdict import front
from .labels import Label, place_labels

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_KINDS = {
    "hpa": ("#0072b2", "o", "HPA and its variants"),
    "compromise": ("#8b2f8b", "P", "the closed-form compromise"),
    "post-training": ("#d55e00", "s", "other post-training methods"),
    "training": ("#009e73", "^", "methods that change the tuning"),
    "bound": ("#666666", "D", "bounds"),
}
_LINES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Whose course over the steps is drawn: more lines than these cannot be told apart.
_FOLLOWED = ("seqft", "hpa", "safe-delta", "model-tailor", "wise-ft", "ewc", "lwf")


_ABSCISSAS = {
    "AP": "AP: mean task score after the last step, % (more is better)",
    "BWT": "BWT: change of a task's score since it was learnt, points (0 is no forgetting)",
}


def trade_off(rows: Sequence[dict[str, Any]], title: str, key: str = "AP") -> Figure:
    """MASR against AP or BWT, a point for each method with its 95 % intervals; the good corner is below on the right.

    The line joins the methods that no other one surpasses in both. A zero-shot model that can do none of the tasks
    would lie far from all others: it is named below the axis instead.
    """
    figure = _figure(9.5, 7.0)
    axes = figure.subplots()
    found = [item for item in summaries(rows) if item.values[key] is not None]
    outside = [item for item in found if item.method == "zero-shot"] if len(found) > 1 else []
    labels = []
    for item in found:
        if item in outside:
            continue
        colour, marker, _ = _KINDS[_kind(item)]
        (x, dx), (y, dy) = item.values[key], item.values["MASR"]
        for half, low, high in ((dx, (x - dx, y), (x + dx, y)), (dy, (x, y - dy), (x, y + dy))):
            if not math.isnan(half):
                axes.plot(*zip(low, high, strict=True), color=colour, lw=0.7, alpha=0.45)
        axes.plot(x, y, color=colour, marker=marker, ms=9 if item.method == "hpa" else 5, linestyle="")
        labels.append(Label(item.title, x, y, colour))
    edge = front([item for item in found if item.kind != "bound"], key)
    axes.plot(
        [item.values[key][0] for item in edge], [item.values["MASR"][0] for item in edge], color="#bbbbbb", lw=6,
        alpha=0.4, solid_capstyle="round", zorder=0,
    )  # fmt: skip
    axes.set_xlabel(_ABSCISSAS[key])
    axes.set_ylabel("MASR: harmful prompts not refused, % (less is better)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    kinds = dict.fromkeys(_kind(item) for item in found)
    handles = [
        Line2D([], [], color=_KINDS[kind][0], marker=_KINDS[kind][1], linestyle="", label=_KINDS[kind][2])
        for kind in kinds
    ]
    for item in outside:
        text = f"{item.title}: AP {item.values['AP'][0]:.0f}, MASR {item.values['MASR'][0]:.0f}"
        handles.append(Line2D([], [], linestyle="", label=text))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    place_labels(axes, labels)
    return figure


def by_step(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """MASR, and the mean score on the tasks learnt so far, after each step: means over seeds."""
    figure = _figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    names = [name for name in _FOLLOWED if any(row["method"] == name for row in rows)]
    tasks = next((row["tasks"] for row in rows if len(row["steps"]) > 1), [])
    for name, colour in zip(names, _LINES, strict=False):
        mine = [row for row in rows if row["method"] == name and len(row["steps"]) == len(tasks)]
        if not mine:
            continue
        label = METHODS[name].title
        safety = np.array([[step["masr"] for step in row["steps"]] for row in mine])
        score = np.array([[np.mean(step["scores"]) for step in row["steps"]] for row in mine])
        for axes, values in ((left, safety), (right, score)):
            width = 2.4 if name == "hpa" else 1.3
            axes.plot(range(len(tasks)), values.mean(0), color=colour, label=label, marker="o", ms=3, lw=width)
    for axes, text in ((left, "MASR, %"), (right, "mean score on the tasks learnt so far, %")):
        axes.set_xticks(range(len(tasks)), [f"{place + 1}\n{task}" for place, task in enumerate(tasks)], fontsize=8)
        axes.set_ylabel(text)
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.25)
    left.set_title(title, loc="left", fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1), fontsize=8, frameon=False)
    return figure


def by_layer(rows: Sequence[dict[str, Any]], title: str) -> Figure | None:
    """HPA's alpha, the share of columns retained, and the overlap of safety and task columns, for every linear.

    Means over seeds and steps; None if no row of HPA has a report.
    """
    layers = [step["layers"] for row in rows if row["method"] == "hpa" for step in row["steps"] if step.get("layers")]
    if not layers:
        return None
    mean = {
        "alpha": _mean(layers, lambda found: found["alpha"]),
        "retained": _mean(layers, lambda found: 100 * found["retained"] / found["columns"]),
        "safety": _mean(layers, lambda found: 100 * found["safety"] / found["columns"]),
        "overlap": _mean(layers, lambda found: 100 * found["shared"] / np.maximum(found["safety"], 1)),
    }
    count = len(mean["alpha"])
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    labels = [f"{place // 7 + 1} {kinds[place % 7]}" if count % 7 == 0 else str(place) for place in range(count)]
    figure = _figure(10.5, 6.4)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    place = np.arange(count)
    top.bar(place, mean["alpha"], color="#0072b2")
    top.set_ylim(0.35, 0.85)
    top.axhline(0.6, color="#999999", lw=0.8)
    top.set_ylabel("α\n(0.4 to 0.8)")
    middle.bar(place, mean["safety"], color="#9ad0f3", label="safety-focused")
    middle.bar(place, mean["retained"], color="#0072b2", label="retained")
    middle.set_ylabel("columns, %")
    middle.legend(fontsize=8, frameon=False)
    bottom.bar(place, mean["overlap"], color="#8b2f8b")
    bottom.axhline(float(mean["safety"].mean()), color="#999999", lw=0.8, ls="--", label="if chosen at random")
    bottom.legend(fontsize=8, loc="lower right", framealpha=0.9)
    bottom.set_ylabel("safety columns that\nare task columns too, %")
    bottom.set_ylim(0, 100)
    bottom.set_xticks(place, labels, rotation=90, fontsize=7)
    bottom.set_xlabel("decoder layer and linear")
    top.set_title(title, loc="left", fontsize=11)
    return figure


def output_change(rows: Sequence[dict[str, Any]], title: str) -> Figure | None:
    """What a merge takes back of the outputs' change on safety samples, against what it costs on the task's samples.

    Means over linears, steps and seeds (see `hpa_ext.continual.output_change`); None if no row has the figures.
    """
    points = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        steps = [step for row in rows if row["method"] == name for step in row["steps"] if "safety_left" in step]
        if steps:
            points[name] = [100 * float(np.mean([step[key] for step in steps])) for key in ("task_lost", "safety_left")]
    if not points:
        return None
    figure = _figure(9.5, 6.0)
    axes = figure.subplots()
    labels = []
    for name, (x, y) in points.items():
        known = METHODS.get(name)
        colour, marker, _ = _KINDS[_family(name) or "post-training"]
        axes.plot(x, y, color=colour, marker=marker, ms=9 if name == "hpa" else 5)
        labels.append(Label(known.title if known else name, x, y, colour))
    share = np.linspace(0, 1, 101)
    axes.plot(100 * (1 - share) ** 2, 100 * share**2, color="#888888", lw=0.9, ls="--")
    axes.text(31, 18, "the whole update scaled down", color="#666666", fontsize=8)
    axes.set_xlabel("change of the task's outputs that is taken back, % of what tuning changed (less is better)")
    axes.set_ylabel("change of the safety samples' outputs\nthat is left, % (less is better)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    place_labels(axes, labels)
    return figure


def _mean(layers: list[dict[str, list[float]]], value: Callable[[dict[str, np.ndarray]], np.ndarray]) -> np.ndarray:
    """Mean over steps and seeds of a value of each linear."""
    return np.mean([value({key: np.array(column) for key, column in found.items()}) for found in layers], axis=0)


def _kind(item: Summary) -> str:
    return _family(item.method) or (item.kind if item.kind in _KINDS else "post-training")


def _family(name: str) -> str | None:
    """The kind of its own that a method belongs to by its name."""
    return next((family for family in ("hpa", "compromise") if name.startswith(family)), None)


def _figure(width: float, height: float) -> Figure:
    # The object interface, because pyplot would hold global state and may want a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
