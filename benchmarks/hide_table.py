"""The tables of ``hide_tasks.py`` and ``hide_safety.py``: mean and 95 % interval over the seeds that are there.

python benchmarks/hide_table.py WORK
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hpa_ext.continual.metrics import continual_metrics, mean_and_interval
from hpa_ext.reporting.table import format_table


def cell(values: Sequence[float]) -> str:
    """Mean, half width of the interval, and how many seeds."""
    mean, half = mean_and_interval(values)
    return f"{mean:.1f} ± {half:.1f} (n={len(values)})" if len(values) > 1 else f"{mean:.1f} (n=1)"


def sequences(work: Path) -> str:
    """Last, Avg, BWT and MASR of each method and order."""
    found: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(work.glob("seed-*/*-*.json")):
        name, _, order = path.stem.rpartition("-")
        found.setdefault((name, order), []).append(json.loads(path.read_text()))
    rows = []
    for (name, order), runs in sorted(found.items()):
        metrics = [continual_metrics(run["scores"]) for run in runs]
        row = [name, order, *(cell([metric[key] for metric in metrics]) for key in ("Last", "Avg", "BWT"))]
        attacked = [run["masr"] for run in runs if "masr" in run]
        rows.append([*row, cell(attacked) if attacked else "-"])
    return format_table(("method", "order", "Last", "Avg", "BWT", "MASR"), rows)


def ablations(work: Path) -> str:
    """Last of each ablation, the difference from HiDe in the same seed, and the parameters."""
    runs = [json.loads(path.read_text()) for path in sorted(work.glob("seed-*/ablations.json"))]
    if not runs:
        return "no ablations"
    last = [{name: sum(row["scores"]) / len(row["scores"]) for name, row in run.items()} for run in runs]
    rows = []
    for name in runs[0]:
        having = [values for values in last if name in values]
        differences = [values[name] - values["HiDe"] for values in having]
        total = runs[0][name]["parameters"]["total"] / runs[0]["HiDe"]["parameters"]["total"]
        rows.append([name, cell([values[name] for values in having]), cell(differences), f"{total:.2f}"])
    return format_table(("ablation", "Last", "against HiDe", "parameters, HiDe = 1"), rows)


def safety(work: Path) -> str:
    """Last and MASR with and without harmonizing, the variants of a model below each other."""
    found: dict[str, list[dict]] = {}
    for path in sorted(work.glob("seed-*/safety_*.json"), key=lambda path: (path.stem != "safety_hide", path)):
        for name, row in json.loads(path.read_text()).items():
            found.setdefault(name, []).append(row)
    if not found:
        return "no safety runs"
    rows = []
    first = {name.partition(" + ")[0]: row for row, name in reversed(list(enumerate(found)))}
    for name in sorted(found, key=lambda name: (first[name.partition(" + ")[0]], " + " in name)):
        given = found[name]
        scores = [sum(row["scores"]) / len(row["scores"]) for row in given]
        rows.append([name, cell(scores), cell([row["masr"] for row in given])])
    return format_table(("model", "Last", "MASR"), rows)


def main() -> int:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of hide_tasks.py")
    arguments = parser.parse_args()
    print(sequences(arguments.work), ablations(arguments.work), safety(arguments.work), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
