"""A picture of which columns HPA retained, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from hpa_ext.hpa.report import LayerReport

# Colours that stay apart for colour-blind readers (Okabe and Ito); order is the drawing order of the categories.
_CATEGORIES = (
    ("neither", "#f2f2f2"),
    ("task-focused", "#e69f00"),
    ("safety-focused", "#9ad0f3"),
    ("both", "#c8b6d9"),
    ("retained, safety alone", "#0072b2"),
    ("retained, shared", "#8b2f8b"),
)
_BINS = 400


def plot_retained_columns(layers: Mapping[str, LayerReport], path: str | Path, title: str) -> Path:
    """Draw one strip for each weight, its input columns from left to right, coloured by what HPA made of them.

    Args:
        layers: reports by module name, as in ``ModelReport.layers``.
        path: where to write; the ending chooses the format (png, svg, pdf).
        title: what the picture shows.

    Returns:
        The path written.

    Raises:
        ValueError: there is no layer to draw.
    """
    if not layers:
        raise ValueError("layers: expected at least one LayerReport, got none")
    # The object interface, because pyplot would hold global state and may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    strips = np.stack([_strip(report) for report in layers.values()])
    figure = Figure(figsize=(11, 1.6 + 0.24 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(
        strips,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap([colour for _, colour in _CATEGORIES]),
        vmin=-0.5,
        vmax=len(_CATEGORIES) - 0.5,
        extent=(0, 100, len(layers), 0),
    )
    labels = [f"{_short(name)}   {report.retained_count}/{len(report.retained)}" for name, report in layers.items()]
    axes.set_yticks(np.arange(len(layers)) + 0.5, labels, fontsize=7, family="monospace")
    axes.hlines(np.arange(1, len(layers)), 0, 100, colors="white", linewidth=1)
    axes.set_xlabel("column of the weight, in percent of its columns")
    axes.set_title(title, fontsize=11, loc="left")
    handles = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in _CATEGORIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _strip(report: LayerReport) -> np.ndarray:
    """Category of each of _BINS positions across the columns; a bin shows the strongest category in it."""

    def marks(mask: Tensor) -> np.ndarray:
        return mask.numpy().astype(bool)

    safety, task, retained = marks(report.safety_columns), marks(report.task_columns), marks(report.retained)
    category = np.zeros(len(retained), dtype=np.int64)
    category[task & ~safety] = 1
    category[safety & ~task] = 2
    category[safety & task] = 3
    category[retained & ~task] = 4
    category[retained & task] = 5
    edges = np.linspace(0, len(category), _BINS + 1)
    return np.array([category[int(a) : max(int(np.ceil(b)), int(a) + 1)].max() for a, b in itertools.pairwise(edges)])


def _short(name: str) -> str:
    """``layers.3.self_attn.q_proj`` of a longer name."""
    start = name.find("layers.")
    return name[start:] if start >= 0 else name
