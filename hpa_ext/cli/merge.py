"""``hpa-ext merge``: adapters into a checkpoint, from disk to disk."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "merge",
        help="merge LoRA or HPA adapters into a checkpoint",
        description="Writes the model with the adapters merged into it, a weight at a time: the column gain of an HPA "
        "adapter is applied, which plain PEFT does not do. Until all is written the output lies in OUT.partial.",
        epilog="Exit code: 0 done, 2 the input does not fit or the disk is too small, 130 interrupted.",
    )
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the model that the first adapter is for"
    )
    parser.add_argument(
        "--adapter", type=Path, required=True, action="append", metavar="DIR", dest="adapters",
        help="LoRA or HPA adapter; may be repeated, in the order of the steps",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, or begin")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, then say where it is."""
    # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
    from transformers.utils import logging

    from hpa_ext.hpa.checkpoint import merge_checkpoint
    from hpa_ext.processes import Processes, torchrun_processes

    logging.set_verbosity_error()
    with torchrun_processes() if "RANK" in os.environ else nullcontext():
        merge_checkpoint(args.base, args.adapters, args.out, resume=args.resume, progress=not args.quiet)
        if Processes.current().is_first:
            print(f"written: {args.out}")
    return 0
