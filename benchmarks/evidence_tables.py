"""Write the tables of docs/evidence.md from the rows in docs/evidence/.

    python benchmarks/evidence_tables.py

A table stands between ``<!-- table: FILE KIND -->`` and ``<!-- end -->``; FILE is one of docs/evidence/ without its
suffix, KIND one of `KINDS`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpa_ext.baselines import METHODS
from hpa_ext.reporting.continual_tables import (
    ABLATION,
    BEYOND,
    markdown,
    paired_table,
    summaries,
    summary_lines,
    tuning_lines,
)
from hpa_ext.reporting.continual_verdict import verdict

DOCUMENT = Path(__file__).parent.parent / "docs" / "evidence.md"
_BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def output_change_lines(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What merging keeps of an update, mean over linears, steps and seeds; what plain scaling would cost that leaves as
    much of the safety samples' change; and what came of it. By rising MASR.
    """
    lines = []
    for name, (left, lost, learning, masr) in sorted(_changes(rows).items(), key=lambda item: item[1][3]):
        scaled = f"{100 * (1 - left**0.5) ** 2:.0f}" if left <= 1 else "–"
        lines.append(
            [METHODS[name].title, f"{100 * left:.0f}", f"{100 * lost:.0f}", scaled, f"{learning:.1f}", f"{masr:.1f}"]
        )
    header = [
        "method", "safety change left, %", "task change taken back, %", "the same by scaling, %", "learning", "MASR",
    ]  # fmt: skip
    return header, lines


def output_change(rows: list[dict[str, Any]]) -> str:
    """The table, and the rank correlations over its methods."""
    columns = list(zip(*_changes(rows).values(), strict=True))
    names = ("safety change left", "task change taken back", "learning")
    found = [f"{name} {_spearman(values, columns[3]):+.2f}" for name, values in zip(names, columns, strict=False)]
    return f"{markdown(*output_change_lines(rows))}\n\nSpearman of MASR over these methods with {', '.join(found)}."


def _changes(rows: list[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Safety change left, task change taken back, learning and MASR of each method whose rows have the first two."""
    found = {}
    for name in METHODS:
        mine = [row for row in rows if row["method"] == name and "safety_left" in row["steps"][0]]
        if mine:
            steps = [step for row in mine for step in row["steps"]]
            means = [sum(step[key] for step in steps) / len(steps) for key in ("safety_left", "task_lost")]
            found[name] = (*means, *(sum(row[key] for row in mine) / len(mine) for key in ("learning", "MASR")))
    return found


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of values of which no two are equal."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (first, second)))[0, 1])


KINDS = {
    "main": lambda rows: markdown(*summary_lines(summaries(rows))),
    "parts": lambda rows: markdown(*summary_lines(summaries(rows, ABLATION))),
    "beyond": lambda rows: markdown(*summary_lines(summaries(rows, BEYOND))),
    "paired": lambda rows: markdown(*paired_table(rows)),
    "against-hpa": lambda rows: markdown(*paired_table(rows, "hpa")),
    "verdict": lambda rows: "\n".join(f"- {line}" for line in verdict(rows)),
    "output-change": output_change,
    "tuning": lambda found: markdown(*tuning_lines(found)),
}


def updated(text: str, folder: Path) -> str:
    """The document with its tables made anew from the files in the folder."""

    def block(match: re.Match[str]) -> str:
        content = json.loads((folder / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{KINDS[match[3]](content)}\n{match[4]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Rewrite the document."""
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8"), DOCUMENT.parent / "evidence"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
