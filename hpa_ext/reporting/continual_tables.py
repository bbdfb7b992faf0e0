"""The rows of the continual benchmark, grouped and averaged over seeds, as tables for a terminal, Markdown and HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpa_ext.baselines import METHODS
from hpa_ext.continual.metrics import mean_and_interval
from hpa_ext.reporting.continual_pairs import PAIRED, differences
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
# What stands above the others in a table; within a kind the registry's order holds, HPA itself before its variants.
_KIND_ORDER = ("bound", "post-training", "training")
ABLATION = (
    "seqft",
    "hpa-safety",
    "hpa-shared",
    "hpa-both",
    "hpa-orthogonal",
    "hpa",
    "hpa-wide",
    "hpa-sum",
    "hpa-compensated",
    "hpa-compensated-safety",
    "hpa-gram-alone",
    "retain-largest",
    "retain-random",
)
BEYOND = (
    "seqft",
    "hpa",
    "hpa-wide",
    "hpa-gram-alone",
    "hpa-compensated",
    "hpa-compensated-safety",
    "regmean",
    "compromise",
    "compromise-budget",
    "compromise-sequential",
    "compromise-earlier",
    "compromise-budget-earlier",
    "compromise-low-rank",
    "compromise-diagonal",
)
SECTIONS = (("parts of HPA, and controls", ABLATION), ("beyond HPA", BEYOND))
"""Tables beside the main one, by heading."""


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
        known = sorted((name for name, found in METHODS.items() if found.group == "main"), key=_place)
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


def _place(name: str) -> tuple[int, bool, bool]:
    return _KIND_ORDER.index(METHODS[name].kind), name != "hpa", not name.startswith("hpa")


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
        for label, names in (("", None), *((f", {heading}", names) for heading, names in SECTIONS)):
            found = summaries(mine, names)
            if not found or (names is not None and not has_more_than_references(found)):
                continue
            header = ["method", *(heading for _, heading, _ in COLUMNS), "seeds"]
            lines = [
                [item.title, *(cell(item.values[key]) for key, _, _ in COLUMNS), str(len(item.seeds))] for item in found
            ]
            parts.append(f"{condition} data, order {order}{label}\n{format_table(header, lines)}")
    return "\n\n".join(parts)


def has_more_than_references(found: Sequence[Summary]) -> bool:
    """Whether a table beside the main one would hold more than what all of them hold."""
    return any(item.method not in ("seqft", "hpa") for item in found)


def summary_lines(found: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for documentation; without Last, which is AP."""
    keys = [(key, heading) for key, heading, _ in COLUMNS if key != "Last"]
    lines = [[item.title, *(cell(item.values[key]) for key, _ in keys), str(len(item.seeds))] for item in found]
    return ["method", *(heading for _, heading in keys), "seeds"], lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paired_table(rows: Sequence[dict[str, Any]], reference: str = "seqft") -> tuple[list[str], list[list[str]]]:
    """Header and lines: each method minus the reference on the same seeds. A star: the 95 % interval does not hold 0.

    Empty lines if the rows have no such pairs.
    """
    lines = []
    tables = (summaries(rows), *(summaries(rows, names) for _, names in SECTIONS))
    for name in dict.fromkeys([item.method for table in tables for item in table]):
        gains = differences(rows, name, reference) if name != reference else {}
        if "BWT" in gains:
            marks = [f"{gain}{' *' if gain.is_better or gain.is_worse else ''}" for gain in gains.values()]
            lines.append([METHODS[name].title if name in METHODS else name, *marks])
    return ["method", *(key for key, _ in PAIRED)], lines


def tuning_lines(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what `hpa_ext.continual.tuning.tune` tried; a star marks what it took."""
    lines = []
    for name, entry in found.items():
        label = f"{METHODS[name].title if name in METHODS else name}, `{entry['strength']}`"
        for tried in entry["tried"]:
            value = json.dumps(tried["value"]) + (" *" if tried["value"] == entry["chosen"] else "")
            numbers = ["–" if tried[key] is None else f"{tried[key]:.1f}" for key in ("AP", "BWT", "learning", "MASR")]
            lines.append([label, value, *numbers])
            label = ""
    return ["method", "value", "AP", "BWT", "learning", "MASR"], lines


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


def html_lines(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A plain table for the page."""
    rows = ["".join(f"<td>{html.escape(text)}</td>" for text in line) for line in lines]
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody></table>"
