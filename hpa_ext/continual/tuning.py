"""The tuning protocol: every method that has a strength gets the same small budget, on seeds that are never reported.

For each value of the method's grid the first three steps of order 1 are run for each tuning seed, on the original data.
Taken is the value with the largest mean of ``AP - MASR`` after them; the first one of the grid on a tie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpa_ext.baselines.registry import method

from .cells import Cell, run_cells
from .settings import TUNING_SEEDS, ContinualSettings

_STEPS = 3


def tuning_cells(names: Sequence[str], seeds: Sequence[int] = TUNING_SEEDS[:1]) -> list[Cell]:
    """A cell for each value of each method that has a strength. ValueError for an unknown method."""
    known = [method(name) for name in names]
    return [
        Cell(found.name, seed, "original", 1, value)
        for found in known
        if found.strength is not None
        for value in found.grid
        for seed in seeds
    ]


def tune(
    names: Sequence[str],
    settings: ContinualSettings,
    out: Path,
    seeds: Sequence[int] = TUNING_SEEDS[:1],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The value to take for each method that has a strength, and what each value of its grid gave."""
    short = dataclasses.replace(settings, steps=min(_STEPS, settings.tasks))
    rows = run_cells(tuning_cells(names, seeds), short, out, say)
    found: dict[str, Any] = {}
    for name in names:
        strength = method(name).strength
        if strength is None:
            continue
        tried = {}
        for value in method(name).grid:
            same = [
                row
                for row in rows
                if row["method"] == name and _plain(row["config"]["method"][strength]) == _plain(value)
            ]
            if same:
                tried[str(value)] = {
                    "value": value,
                    **{key: sum(row[key] for row in same) / len(same) for key in ("AP", "BWT", "learning", "MASR")},
                }
        if tried:
            best = max(tried.values(), key=lambda entry: entry["AP"] - entry["MASR"])
            found[name] = {"strength": strength, "chosen": best["value"], "tried": list(tried.values())}
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
