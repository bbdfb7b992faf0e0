"""``hpa-ext bench continual``: methods through sequences of tuning steps on the embedded model."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

DEFAULT_SEEDS = (21, 22, 23, 24, 25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seeds", type=_integers, metavar="N,N", help="evaluation seeds (default: 21,22,23,24,25)")
    parser.add_argument("--methods", type=_names, metavar="A,B", help="methods by name (default: all; see --list)")
    parser.add_argument(
        "--condition", choices=("original", "injected", "both"), help="default: both; with --quick or --mini original"
    )
    parser.add_argument("--order", type=_integers, metavar="N,N", help="orders of the tasks, of 1 and 2 (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("hpa-ext-continual"), metavar="DIR", help="where rows are kept"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three short tasks, one seed: under 10 minutes")
    size.add_argument("--mini", action="store_true", help="two tasks of a few steps: to see that all runs")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), help="of the tuning (default: bfloat16)")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="another value of a setting of the regime, such as safety_calibration_count=64 (see docs/evidence.md)",
    )
    parser.add_argument(
        "--option",
        type=_setting,
        action="append",
        default=[],
        dest="options",
        metavar="NAME=VALUE",
        help="another value of a setting of the methods, all of which must have it, such as earlier_strength=0.3",
    )
    parser.add_argument("--tune", action="store_true", help="run the tuning protocol and print what it chooses")
    parser.add_argument("--tuning-seeds", type=_integers, metavar="N,N", help="for --tune (default: 100)")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report on the rows that are there")
    parser.add_argument(
        "--method-file", type=Path, action="append", default=[], metavar="FILE", help="registers a method"
    )
    parser.add_argument(
        "--rows-from", type=Path, action="append", default=[], metavar="FILE", help="take rows of this results.json"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no sequence after this many minutes")
    parser.add_argument("--list", action="store_true", help="list the methods and leave")


def add_parser(subparsers: argparse._SubParsersAction, name: str = "bench-continual") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        name,
        prog="hpa-ext bench continual",
        help="compare methods on sequences of tuning steps",
        description="Tunes the embedded model on six tasks in turn, applies each method after (or in) each step, and "
        "measures what is left of the tasks and of safety. Rows are kept in DIR and taken from there by a later run; "
        "several processes may share a DIR. Writes DIR/results.json, DIR/tables.md, DIR/report.html and pictures.",
        epilog="Exit code: 0, or 2 for wrong usage.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run, aggregate, report."""
    import torch
    import transformers

    from hpa_ext.baselines import METHODS, load_file
    from hpa_ext.continual.cells import cells, import_rows, read_row, run_cells, write_results
    from hpa_ext.continual.settings import CONDITIONS, TUNING_SEEDS, ContinualSettings, mini_settings, quick_settings
    from hpa_ext.continual.tuning import tune

    transformers.utils.logging.disable_progress_bar()
    # Matrices of this size gain nothing from a second thread, and processes that share a machine lose by it.
    torch.set_num_threads(1)
    for path in args.method_file:
        load_file(path)
    if args.list:
        for known in METHODS.values():
            print(f"{known.name:24} {known.kind:14} {known.title} ({known.source})")
        return 0
    settings = quick_settings() if args.quick else mini_settings() if args.mini else ContinualSettings()
    if args.precision:
        settings = settings.changed(precision=args.precision)
    settings = settings.changed(**dict(args.changes))
    names = args.methods or list(METHODS)
    if args.tune and args.options:
        raise ValueError("--option: has no part in --tune, which runs every method with its own settings")
    if args.tune:
        found = tune(names, settings, args.out, args.tuning_seeds or TUNING_SEEDS[:1], _say)
        (args.out / "tuning.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        from hpa_ext.reporting.continual_tables import markdown, tuning_lines

        table = markdown(*tuning_lines(found))
        (args.out / "tuning.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        return 0
    small = args.quick or args.mini
    seeds = args.seeds or (DEFAULT_SEEDS[:1] if small else DEFAULT_SEEDS)
    condition = args.condition or ("original" if small else "both")
    conditions = CONDITIONS if condition == "both" else (condition,)
    wanted = cells(names, seeds, conditions, args.order or (1,), dict(args.options))
    for cell in wanted:
        cell.identity(settings)
        settings.order(cell.order)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for path in args.rows_from:
        _say(f"{import_rows(path, args.out)} rows taken from {path}")
    if args.report_only:
        rows = [row for cell in wanted if (row := read_row(cell.path(args.out, settings))) is not None]
    else:
        rows = run_cells(wanted, settings, args.out, _say, deadline)
    if not rows:
        raise ValueError(f"--out: there are no rows in {args.out} yet")
    print(f"{len(rows)} rows in {write_results(rows, args.out)}")
    from hpa_ext.reporting.continual import main_table, write_report, write_tables

    print(main_table(rows))
    print(f"tables: {write_tables(rows, args.out)}")
    print(f"report: {write_report(rows, args.out)}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected integers with commas, got {text!r}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
