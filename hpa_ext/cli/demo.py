"""``hpa-ext demo``: safety lost in tuning and won back, on the embedded model."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="fine-tune the embedded LLaVA, watch its safety erode, and harmonize it",
        description="Fine-tunes the small safety-aligned LLaVA that comes with the package on a new visual task, shows "
        "that it then answers harmful prompts, harmonizes it with the model before tuning, saves and reloads the "
        "result, and prints task score and attack success rate of the three. A few minutes on two cores.",
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="directory to write (default: %(default)s)"
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="instead, write the tiny model, a LoRA adapter tuned on its task, and data in LLaVA format into DIR: all "
        "that it takes to try safety-set, calibrate and harmonize (first seed of --seeds)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run every seed, then print one table and where everything lies."""
    seeds = _seeds(args.seeds)
    if args.export is not None:
        return _export(args.export, seeds[0])
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: expected a directory, got the file {args.out}")
    # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
    from transformers.utils import logging

    from hpa_ext.demo import run_seed, summary_rows
    from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS
    from hpa_ext.reporting.table import format_table

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT calls what transformers 5 has deprecated; nothing here can answer to it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    results = []
    for seed in seeds:
        results.append(run_seed(seed, args.out, say=lambda text, seed=seed: print(f"seed {seed}: {text}", flush=True)))
    thrown = sum(result.thrown_out for result in results)
    print(f"\nmean [range] over seeds {', '.join(map(str, seeds))}, in percent (refusal list: {DEFAULT_REFUSALS.id})\n")
    header = ("model", "new task, accuracy", "harmful prompts answered (MASR)", "captions kept, exact")
    print(format_table(header, summary_rows(results)))
    print(f"\nsafety calibration: answers of the aligned model that were no refusals and were replaced: {thrown}")
    print("written:")
    for result in results:
        print(f"  {result.directory / 'model'}  a checkpoint for transformers' from_pretrained")
        print(
            f"  {result.directory / 'retained-columns.png'}  which columns were retained; report.json has the numbers"
        )
    return 0


def _export(directory: Path, seed: int) -> int:
    from transformers.utils import logging

    from hpa_ext.export_demo import export_demo

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    export_demo(directory, seed, say=lambda text: print(text, flush=True))
    return 0


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected comma-separated integers, got {text!r}") from None
    if min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds: expected different integers from 0 to 2^32 - 1, got {text!r}")
    return seeds
