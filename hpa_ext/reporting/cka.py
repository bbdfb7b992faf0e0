"""Pictures of CKA between tasks: a heat map for some layers, and the curve over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hpa_ext.hide.layer_cka import LayerCKA


def plot_cka_heat_maps(cka: LayerCKA, path: str | Path, title: str, layers: Sequence[int] | None = None) -> Path:
    """Draw the tasks' CKA as one heat map for each of some layers (HiDe, figure 1, left).

    Args:
        cka: what `hpa_ext.hide.layer_cka` gave.
        path: where to write; the ending chooses the format (png, svg, pdf).
        title: what the picture shows.
        layers: 0-based numbers; None for the bottom, the middle and the top one.

    Raises:
        ValueError: a layer that is not there.
    """
    count = len(cka.layers)
    chosen = sorted({0, count // 2, count - 1}) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
    figure = _figure(2.2 + 3.1 * len(chosen), 3.9)
    low = min(float(cka.values[layer].min()) for layer in chosen)
    axes = np.atleast_1d(figure.subplots(1, len(chosen)))
    for axis, layer in zip(axes, chosen, strict=True):
        values = cka.values[layer].numpy()
        image = axis.imshow(values, vmin=min(low, 0.99), vmax=1.0, cmap="viridis")
        axis.set_title(f"layer {layer + 1} of {count}", fontsize=9)
        axis.set_xticks(range(len(cka.tasks)), cka.tasks, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(cka.tasks)), cka.tasks, fontsize=7)
        middle = (min(low, 0.99) + 1) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="linear CKA")
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_cka_curve(cka: LayerCKA, path: str | Path, title: str) -> Path:
    """Draw the CKA of every pair of tasks over the layers, with their mean (HiDe, figure 1, right)."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    numbers = np.arange(1, len(cka.layers) + 1)
    pairs = torch.triu_indices(len(cka.tasks), len(cka.tasks), offset=1).T.tolist()
    for first, second in pairs:
        axes.plot(numbers, cka.values[:, first, second].numpy(), color="#9ad0f3", linewidth=0.8)
    axes.plot([], [], color="#9ad0f3", linewidth=0.8, label=f"a pair of tasks ({len(pairs)})")
    axes.plot(numbers, cka.curve().numpy(), color="#0072b2", linewidth=2, marker="o", markersize=3, label="mean")
    top = cka.suggest_top_layers().count
    axes.axvspan(len(numbers) - top + 0.5, len(numbers) + 0.5, color="#e69f00", alpha=0.25, label=f"top layers: {top}")
    axes.set_xlim(0.5, len(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("linear CKA between tasks")
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _figure(width: float, height: float):
    # The object interface, because pyplot would hold global state and may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
