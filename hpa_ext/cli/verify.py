"""``hpa-ext verify``: whether an output is complete, unchanged, and kept what it says it kept."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="check a written checkpoint, adapter or Gram file against its hashes",
        description="Reads every file of an output and compares sizes and SHA-256 with hpa_manifest.json, checks the "
        "headers of the weights and the index, and looks for unfinished files. With --old it also compares every "
        "retained column with the old model, bit by bit.",
        epilog="Exit code: 0 if all is as it should be, 1 if there is a problem, 2 if a path cannot be read.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the output directory, or a Gram file")
    parser.add_argument("--old", type=Path, metavar="PATH", help="the model on disk before the step")
    parser.add_argument(
        "--old-adapter", type=Path, action="append", default=[], metavar="DIR", dest="old_adapters",
        help="adapter that belongs to the old model; may be repeated, in the order of the steps",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too; - for standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress, and no output if there is no problem")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, print."""
    from hpa_ext.checkpoints import verify_checkpoint
    from hpa_ext.checkpoints.files import write_atomically

    report = verify_checkpoint(args.path, args.old, not args.quiet, args.old_adapters)
    text = json.dumps(report.to_dict(), indent=2)
    if args.json == Path("-"):
        print(text)
    else:
        if args.json is not None:
            write_atomically(args.json, (text + "\n").encode("utf-8"))
        if not (args.quiet and report.ok):
            print(report, file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 1
