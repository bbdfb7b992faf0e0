"""``hpa-ext harmonize``: a checkpoint, or an adapter, from disk to disk."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpa_ext.cli.compromise_settings import COMPROMISE_SETTINGS, add_compromise_settings, compromise_config
from hpa_ext.cli.hpa_settings import HPA_SETTINGS, add_hpa_settings, hpa_config
from hpa_ext.cli.report_output import check_json, show_report
from hpa_ext.cli.settings import SettingsParser

if TYPE_CHECKING:
    from hpa_ext.compromise.config import CompromiseConfig
    from hpa_ext.hpa.config import HPAConfig

# Settings that both methods have under one name.
_SHARED = ("damping", "rescue")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "harmonize",
        help="harmonize a tuned checkpoint or LoRA adapter with the model before the tuning",
        description="Reads the model before (--old) and after (--new) a tuning step a weight at a time, decides by "
        "the Grams of a safety and a task set (made by `hpa-ext calibrate`) what to keep of the old weights, and "
        "writes the result to --out. --new is a checkpoint or a PEFT LoRA adapter. Memory is that of a few copies of "
        "the largest weight. Until all is written the output lies in OUT.partial; --resume goes on with it.",
        epilog="Exit code: 0 done, 1 the numbers or a process failed, 2 the input does not fit or the disk is too "
        "small, 130 interrupted. On several processes: torchrun --nproc-per-node N --no-python hpa-ext harmonize ...",
    )
    settings = SettingsParser(parser)
    settings.add("--old", type=Path, required=True, metavar="DIR", help="the model before the tuning step")
    settings.add("--new", type=Path, required=True, metavar="DIR", help="the tuned model, or its LoRA adapter")
    settings.add("--safety", type=Path, required=True, metavar="FILE", help="Grams of the safety set, old model")
    settings.add("--task", type=Path, required=True, metavar="FILE", help="Grams of the task set, new model")
    settings.add("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    settings.add(
        "--output", choices=("checkpoint", "adapter"), default="checkpoint",
        help="write a whole checkpoint, or an adapter: of HPA with a column gain, of the compromise a plain one",
    )  # fmt: skip
    settings.add(
        "--method", choices=("hpa", "compromise"), default="hpa",
        help="HPA, which retains columns, or the closed-form compromise, which needs whole Grams",
    )  # fmt: skip
    settings.add(
        "--earlier", type=Path, action="append", default=[], metavar="FILE",
        help="Grams of an earlier task, which the compromise protects like the safety set; may be repeated",
    )  # fmt: skip
    settings.add(
        "--old-adapter", type=Path, action="append", default=[], metavar="DIR", dest="old_adapters",
        help="adapter of an earlier step that belongs to the old model; may be repeated, in the order of the steps",
    )  # fmt: skip
    settings.add("--modules", metavar="REGEX", help="linear layers, by whole name; all of the decoder by default")
    settings.add("--device", default="cpu", metavar="NAME", help="where the arithmetic is done")
    settings.add("--resume", action="store_true", default=False, help="go on with an interrupted run, or begin")
    settings.add("--plan", action="store_true", default=False, help="only say what it would take: disk, memory, time")
    settings.add("--json", type=Path, metavar="FILE", help="write the report (or plan) there too; - for stdout alone")
    settings.add("--quiet", action="store_true", default=False, help="no progress and no table")
    add_hpa_settings(settings)
    add_compromise_settings(settings, without=_SHARED)
    parser.set_defaults(run=run, settings=settings)


def run(args: argparse.Namespace) -> int:
    """Plan or harmonize, then print."""
    given = args.settings.resolve(args)
    config = _config(given, set(args.settings.given(args)))
    check_json(given.json)
    # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
    from transformers.utils import logging

    from hpa_ext.harmonizing import harmonize_checkpoint, plan_checkpoint
    from hpa_ext.processes import Processes, torchrun_processes

    logging.set_verbosity_error()
    arguments: dict[str, Any] = {"config": config} | {
        name: getattr(given, name)
        for name in ("old", "new", "safety", "task", "out", "output", "old_adapters", "modules", "device")
    }
    if given.method == "compromise":
        arguments["earlier"] = given.earlier
    if given.plan:
        plan = plan_checkpoint(**arguments)
        show_report(given, plan, plan.to_dict())
        return 0 if plan.fits else 2
    with torchrun_processes() if "RANK" in os.environ else nullcontext():
        report = harmonize_checkpoint(**arguments, resume=given.resume, progress=not given.quiet)
        if Processes.current().is_first:
            show_report(given, "" if given.quiet else f"{report}\n", report.to_dict(), last=f"written: {given.out}")
    return 0


def _config(given: argparse.Namespace, named: set[str]) -> HPAConfig | CompromiseConfig:
    """The settings of the method; ValueError for one that was named and belongs to the other method alone."""
    own = (set(HPA_SETTINGS), {*COMPROMISE_SETTINGS, "earlier"})
    foreign = own[0] - own[1] if given.method == "compromise" else own[1] - own[0]
    for name in sorted(named & foreign):
        raise ValueError(f"--{name.replace('_', '-')}: is no setting of --method {given.method}")
    if given.method == "hpa":
        return hpa_config(given)
    return compromise_config(given)
