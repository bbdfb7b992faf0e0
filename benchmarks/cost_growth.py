"""How cost grows with width, tokens, layers and rank: measured on this machine, beside what the model of it says.

    python -m benchmarks.cost_growth --out cost-growth.json --plot cost-growth.png [--only gram,rank] [--scratch DIR]
    python -m benchmarks.cost_growth --out cost-growth.json --only ""       # measures nothing: says what is in the file

The model's rates come from the samples that `--plan` takes (`hpa_ext.costs.samples`), in the same process just before;
nothing is fitted to what is then measured. A second call with other phases adds to the same file, on the same device
and with as many threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hpa_ext.reporting.table import format_table

from . import cost_layers, cost_runs
from .cost_point import Point
from .environment import environment

PHASES: dict[str, Callable[[Path], Iterable[Point]]] = {
    "gram": cost_layers.gram,
    "inverse_diagonal": cost_layers.inverse_diagonal,
    "tokens": cost_layers.tokens,
    "calibrate": cost_layers.calibration,
    "harmonize": cost_layers.harmonize_widths,
    "rank": cost_layers.harmonize_ranks,
    "checkpoint": cost_runs.checkpoint,
    "adapter": cost_runs.adapter,
    "memory": cost_runs.memory,
}


_RUNS = {"checkpoint", "adapter"}
_LONG_S, _LARGE_BYTES = 0.5, 100e6

KINDS: dict[str, Callable[[Point], bool]] = {
    "operations and single layers": lambda p: p.unit == "seconds" and p.phase not in _RUNS | {"calibrate"},
    "runs from disk to disk of 0.5 s and more": lambda p: p.phase in _RUNS and p.measured >= _LONG_S,
    "shorter runs": lambda p: p.phase in _RUNS and p.measured < _LONG_S,
    "`calibrate` of a random Llama": lambda p: p.phase == "calibrate",
    "memory of 100 MB and more": lambda p: p.unit == "bytes" and p.measured >= _LARGE_BYTES,
}
"""The lines of the table in docs/costs.md, and which points are in each."""


@dataclass(frozen=True)
class Accuracy:
    """How far predictions are from what was measured: median and largest factor, and how many points."""

    median: float
    worst: float
    points: int

    @classmethod
    def of(cls, points: Iterable[Point]) -> Accuracy:
        """Of points, at least one."""
        factors = [max(point.ratio, 1 / point.ratio) for point in points]
        return cls(statistics.median(factors), max(factors), len(factors))


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the points and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PHASES), help=f"some of {', '.join(PHASES)}")
    parser.add_argument("--out", type=Path, help="JSON file; phases that it holds already stay, unless measured again")
    parser.add_argument("--plot", type=Path, help="picture to draw, of all points in the file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, help="where checkpoints are made; deleted afterwards")
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(PHASES)}, got {', '.join(unknown)}")
    if args.scratch is not None and not args.scratch.is_dir():
        parser.error(f"--scratch: expected a directory, got {args.scratch}")
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {"points": []}
    if args.out is not None and args.out.exists():
        document = json.loads(args.out.read_text())
        _check_same_place(parser, document, args.threads)
    kept = [point for point in document["points"] if point["phase"] not in names]
    found = list(_measured(names, args.scratch))
    points = kept + [asdict(point) for point in found]
    if found:
        document = {**environment(torch.device("cpu")), "threads": args.threads, "points": points}
    elif not points:
        parser.error("--only: expected phases to measure, or --out of a file that holds some")
    order = list(PHASES)
    document["points"].sort(key=lambda point: order.index(point["phase"]))
    points = [Point(**point) for point in document["points"]]
    document["accuracy"] = {
        kind: asdict(Accuracy.of(chosen))
        for kind in ("seconds", "bytes")
        if (chosen := [point for point in points if point.unit == kind])
    }
    if args.out is not None and found:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(points))
    print("", accuracy_table(points), sep="\n")
    if args.plot is not None:
        from hpa_ext.reporting.cost_growth import cost_growth

        cost_growth([asdict(point) for point in points], f"{document['device']}, {args.threads} threads").savefig(
            args.plot
        )
    return 0


def _check_same_place(parser: argparse.ArgumentParser, document: dict[str, Any], threads: int) -> None:
    """One file is of one device and one number of threads: it has only one line for them."""
    here = environment(torch.device("cpu"))["device"]
    if (document["device"], document["threads"]) != (here, threads):
        parser.error(
            f"--out: expected a file of {here} with {threads} threads, got one of {document['device']} with "
            f"{document['threads']}"
        )


def accuracy_table(points: Sequence[Point]) -> str:
    """By kind: points, and the median and the worst factor between measured and predicted."""
    kinds = {
        **{f"all of {unit}": lambda p, unit=unit: p.unit == unit for unit in ("seconds", "bytes")},
        **KINDS,
    }
    rows = []
    for name, belongs in kinds.items():
        if chosen := [point for point in points if belongs(point)]:
            found = Accuracy.of(chosen)
            rows.append((name, str(found.points), f"{found.median:.2f}", f"{found.worst:.2f}"))
    return format_table(("", "points", "median factor", "worst"), rows)


def _measured(names: list[str], scratch: Path | None) -> Iterator[Point]:
    for name in names:
        directory = Path(tempfile.mkdtemp(dir=scratch))
        try:
            for point in PHASES[name](directory):
                print(f"{point.phase} {point.series} {point.variable} {point.value:g}: {point.ratio:.2f}", flush=True)
                yield point
        finally:
            shutil.rmtree(directory)


def table(points: Iterable[Point]) -> str:
    """Every point, with measured over predicted and the slope from the point before in the same series."""
    rows = []
    before: dict[tuple[str, str, str], Point] = {}
    for point in points:
        last = before.get((point.phase, point.series, point.variable))
        slope = ""
        if last is not None and last.value != point.value:
            slope = f"{math.log(point.measured / last.measured) / math.log(point.value / last.value):.2f}"
        before[point.phase, point.series, point.variable] = point
        rows.append(
            (
                point.phase, point.series, f"{point.variable} {point.value:g}", point.text(point.measured),
                point.text(point.predicted), f"{point.ratio:.2f}", slope,
            )
        )  # fmt: skip
    return format_table(("phase", "what", "size", "measured", "predicted", "measured / predicted", "slope"), rows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
