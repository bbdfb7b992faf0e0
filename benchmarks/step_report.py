"""The step's phases as text: measured, floor, peer. ``python -m hpa_ext.benchmarks.step_report FILE`` reads rows."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpa_ext.reporting.table import format_table
from hpa_ext.reporting.time_line import by_phase, steps, time_line
from hpa_ext.reporting.units import bytes_text

_RowData = dict[str, Any]


def report(rows: Sequence[_RowData]) -> str:
    """A paragraph and a table for each step among the rows of a results file; "" if there is none."""
    return "\n\n".join(_report(found) for found in steps(rows))


def _report(found: list[_RowData]) -> str:
    details = found[0]["details"]
    names = details["phases"]
    columns = [by_phase(details["ours"]), [sum(column) for column in zip(*details["floor_layers"], strict=True)]]
    columns += [by_phase(row["details"]["peer"]) for row in found]
    total = sum(columns[0])
    lines = [(name, values) for name, *values in zip(names, *columns, strict=True)]
    wholes = [sum(column) for column in columns]
    forward = names.index("forward")
    lines.append(
        ("without the forward", [whole - column[forward] for whole, column in zip(wholes, columns, strict=True)])
    )
    lines.append(("the whole step", wholes))
    header = ["phase", "ours, ms", "of the whole", "floor, ms", "above it, ms", "floor / ours"]
    for row in found:
        header += [f"{row['peer']}, ms", "/ ours"]
    cells = [_line(name, values, total) for name, values in lines]
    return "\n".join([details["words"], "", format_table(header, cells), "", *_remarks(found)])


def _line(name: str, values: list[float], total: float) -> list[str]:
    """Cells of ours, the floor, and the peers."""
    ours, floor, *peers = values
    cells = [name, _ms(ours), f"{ours / total:.0%}", _ms(floor) if floor else "", _ms(ours - floor)]
    cells.append(f"{floor / ours:.0%}" if floor else "")
    for peer in peers:
        cells += [_ms(peer), f"{peer / ours:.1f}" if name != "other" else ""]
    return cells


def _remarks(found: list[_RowData]) -> list[str]:
    details = found[0]["details"]
    layers = sorted(sum(layer) for layer in details["ours"]["layers"])
    outside = sum(details["ours"]["outside"])
    spread = f"{_ms(layers[0])} to {_ms(layers[-1])} ms, median {_ms(statistics.median(layers))}"
    lines = [
        f"Ours by decoder layer: {spread if len(layers) > 1 else _ms(layers[0]) + ' ms'}; "
        f"outside of the layers {_ms(outside)} ms.",
        f"{details['grams']} Grams of distinct inputs were factored, {details['grams_from_rows']} of them from their "
        "tokens' rows.",
        "The floor takes the rates of torch's own products and copies, measured before: what is faster is below it.",
    ]
    for row in found:
        agreement = row["details"]["agreement"]
        difference = agreement["difference"]  # NaN is null in a results file
        apart = "are not finite" if difference is None else f"differ by {difference:.1e} of the update"
        lines.append(
            f"Against {row['peer']}: {agreement['differing_columns']} of {agreement['columns']} columns decided "
            f"otherwise, in {agreement['differing_linears']} of {agreement['linears']} linears; the weights {apart}."
        )
        peaks = row["details"]["peak_bytes"]
        if peaks is not None:
            lines.append(f"Most memory: ours {bytes_text(peaks['ours'])}, {row['peer']} {bytes_text(peaks['peer'])}.")
    plan = details["memory_plan"]
    lines.append(
        f"Planned: models {bytes_text(plan['models'])}, Grams of one set {bytes_text(plan['grams_ours'])} "
        f"(peer {bytes_text(plan['grams_peer'])}), work {bytes_text(plan['work'])}."
    )
    return lines


def _ms(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the phases of a results file's steps, and draw them."""
    parser = argparse.ArgumentParser(description="Print the phases of the steps in a results file, and draw them.")
    parser.add_argument("file", type=Path, help="what `hpa-ext bench step` saved")
    parser.add_argument("--time-line", type=Path, metavar="FILE", help="also draw them (.png, .svg or .pdf)")
    args = parser.parse_args(arguments)
    document = json.loads(args.file.read_text(encoding="utf-8"))
    text = report(document["rows"])
    if not text:
        print(f"{args.file}: expected rows of step_vs_torch_fp32, got none", file=sys.stderr)
        return 1
    print(text)
    if args.time_line is not None:
        time_line(document["rows"], title(document)).savefig(args.time_line)
    return 0


def title(document: dict[str, Any]) -> str:
    """What a picture of a results file says about where it was measured."""
    return (
        f"{document['device']}, {document['threads']} thread{'s' if document['threads'] != 1 else ''}, "
        f"{document['instruction_set']}; load average before {document['load_average']:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
