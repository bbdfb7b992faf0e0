"""The rows of the continual benchmark, grouped and averaged over seeds, as tables for a terminal, Markdown and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpa_ext.baselines import METHODS
from hpa_ext.continual.metrics import mean_and_interval
from hpa_ext.reporting.table import format_table

# Key in a row, heading, and whether more or less of it is better (0: neither).
COLUMNS = (
    ("AP", "AP", 1),
    ("BWT", "BWT", 1),
    ("Avg", "Avg", 1),
    ("Last", "Last", 1),
    ("MASR", "MASR", -1),
    ("DASR", "DASR", -1),
    ("learning", "learning", 1),
    ("method_seconds", "method s", 0),
    ("method_mb", "method MB", 0),
)
ABLATION = (
    "seqft",
    "hpa-safety",
    "hpa-shared",
    "hpa-both",
    "hpa-orthogonal",
    "hpa",
    "hpa-wide",
    "retain-largest",
    "retain-random",
)


@dataclass(frozen=True)
class Summary:
    """One method under one condition and order: mean and half-width of the 95 % interval of each column, over seeds."""

    method: str
    title: str
    kind: str
    values: dict[str, tuple[float, float] | None]
    seeds: tuple[int, ...]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rows by (condition, order), the original data first."""
    keys = sorted({(row["condition"], row["order"]) for row in rows}, key=lambda key: (key[1], key[0] != "original"))
    return {key: [row for row in rows if (row["condition"], row["order"]) == key] for key in keys}


def summaries(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> list[Summary]:
    """One summary per method in the rows of one condition and order, in the order of the registry.

    ``names``: those alone, in that order. None: all that stand in the main table.
    """
    present = {row["method"] for row in rows}
    if names is None:
        known = [name for name, found in METHODS.items() if found.group == "main"]
        names = known + sorted(present - set(METHODS))
    found = []
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        if not mine:
            continue
        values = {}
        for key, _, _ in COLUMNS:
            numbers = [row[key] for row in mine if row.get(key) is not None]
            values[key] = mean_and_interval(numbers) if numbers else None
        known = METHODS.get(name)
        seeds = tuple(sorted(row["seed"] for row in mine))
        found.append(Summary(name, known.title if known else name, known.kind if known else "", values, seeds))
    return found


def cell(value: tuple[float, float] | None) -> str:
    """``mean ± half`` with one decimal; the mean alone for one seed; a dash for nothing."""
    if value is None:
        return "–"
    mean, half = value
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def main_table(rows: Sequence[dict[str, Any]]) -> str:
    """The main tables and the ablation tables, for a terminal."""
    parts = []
    for (condition, order), mine in groups(rows).items():
        for label, names in (("", None), (", ablation of HPA", ABLATION)):
            found = summaries(mine, names)
            if not found or (names is not None and not any(item.method not in ("seqft", "hpa") for item in found)):
                continue
            header = ["method", *(heading for _, heading, _ in COLUMNS), "seeds"]
            lines = [
                [item.title, *(cell(item.values[key]) for key, _, _ in COLUMNS), str(len(item.seeds))] for item in found
            ]
            parts.append(f"{condition} data, order {order}{label}\n{format_table(header, lines)}")
    return "\n\n".join(parts)


def markdown_table(found: Sequence[Summary]) -> str:
    """A table for the documentation."""
    keys = [key for key, _, _ in COLUMNS if key != "Last"]
    headings = {key: heading for key, heading, _ in COLUMNS}
    lines = ["| method | " + " | ".join(headings[key] for key in keys) + " | seeds |"]
    lines.append("|" + "---|" * (len(keys) + 2))
    for item in found:
        cells = " | ".join(cell(item.values[key]) for key in keys)
        lines.append(f"| {item.title} | {cells} | {len(item.seeds)} |")
    return "\n".join(lines)


def html_table(found: Sequence[Summary]) -> str:
    """A table for the page; the best mean of each column among methods (not bounds) is bold."""
    methods = [item for item in found if item.kind != "bound"]
    best = {}
    for key, _, direction in COLUMNS:
        means = [item.values[key][0] for item in methods if item.values[key] is not None]
        if direction and len(means) > 1:
            best[key] = max(means) if direction > 0 else min(means)
    lines = ["<table><thead><tr><th>method</th>"]
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    lines += [f"<th>{heading}{arrows[direction]}</th>" for _, heading, direction in COLUMNS]
    lines.append("<th>seeds</th></tr></thead><tbody>")
    for item in found:
        style = "hpa" if item.method.startswith("hpa") else item.kind
        lines.append(f'<tr class="{style}"><td>{html.escape(item.title)}</td>')
        for key, _, _ in COLUMNS:
            value = item.values[key]
            is_best = item.kind != "bound" and value is not None and key in best and value[0] == best[key]
            text = cell(value)
            lines.append(f"<td>{'<b>' + text + '</b>' if is_best else text}</td>")
        lines.append(f"<td>{len(item.seeds)}</td></tr>")
    lines.append("</tbody></table>")
    return "".join(lines)
