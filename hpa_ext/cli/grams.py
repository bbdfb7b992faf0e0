"""``hpa-ext grams``: several tasks' Gram files as one."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "grams",
        help="add the Gram files of several tasks up, to protect these tasks in the next step",
        description="Adds Gram files of different tasks up, each task counting alike whatever its number of tokens: "
        "one file, as large as one of them, for --earlier of `hpa-ext adapter` and `hpa-ext harmonize`. A file that is "
        "such a sum can be added to.",
        epilog="Exit code: 0 done, 1 the numbers failed, 2 the input does not fit.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser("sum", help="write the sum of the tasks")
    action.add_argument("files", type=Path, nargs="+", metavar="FILE", help="whole Grams, of the same modules")
    action.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to make, .safetensors")
    action.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Add up, then say what was written."""
    from hpa_ext.compromise.earlier import sum_gram_files

    with sum_gram_files(args.files, args.out) as written:
        size = written.path.stat().st_size
        print(f"written: {written.path} ({size / 1e6:.1f} MB), {len(written)} modules, {len(written.groups)} Grams")
    return 0
