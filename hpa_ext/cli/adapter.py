"""``hpa-ext adapter``: the compromise of a LoRA adapter, without its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpa_ext.cli.compromise_settings import add_compromise_settings, compromise_config
from hpa_ext.cli.report_output import check_json, show_report
from hpa_ext.cli.settings import SettingsParser


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "adapter",
        help="make a LoRA adapter safer: an adapter of the same rank, without reading the base model",
        description="Replaces the A of each LoRA by the closed-form compromise between the tuned outputs on the task "
        "set and the old ones on the safety set, by their Grams (made by `hpa-ext calibrate`, without --reduce). The "
        "result is an ordinary PEFT adapter for the same base, quantised or not. Until all is written the output lies "
        "in OUT.partial; --resume goes on with it.",
        epilog="Exit code: 0 done, 1 the numbers failed, 2 the input does not fit or the disk is too small, 130 "
        "interrupted.",
    )
    settings = SettingsParser(parser)
    settings.add("--adapter", type=Path, required=True, metavar="DIR", help="PEFT LoRA adapter of the tuning step")
    settings.add("--safety", type=Path, required=True, metavar="FILE", help="Grams of the safety set, old model")
    settings.add("--task", type=Path, required=True, metavar="FILE", help="Grams of the task set, new model")
    settings.add("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    settings.add(
        "--earlier", type=Path, action="append", default=[], metavar="FILE",
        help="Grams of an earlier task, to be protected like the safety set; may be repeated",
    )  # fmt: skip
    settings.add(
        "--base", type=Path, metavar="DIR",
        help="the base model, of which config.json alone is read; for adapters with names of older versions",
    )  # fmt: skip
    settings.add("--modules", metavar="REGEX", help="modules, by whole name; all that the Grams have by default")
    settings.add("--device", default="cpu", metavar="NAME", help="where the arithmetic is done")
    settings.add("--resume", action="store_true", default=False, help="go on with an interrupted run, or begin")
    settings.add("--plan", action="store_true", default=False, help="only say what it would take: disk, memory, time")
    settings.add("--json", type=Path, metavar="FILE", help="write the report (or plan) there too; - for stdout alone")
    settings.add("--quiet", action="store_true", default=False, help="no progress and no table")
    add_compromise_settings(settings)
    parser.set_defaults(run=run, settings=settings)


def run(args: argparse.Namespace) -> int:
    """Plan or harmonize, then print."""
    given = args.settings.resolve(args)
    config = compromise_config(given)
    check_json(given.json)
    from hpa_ext.compromise.adapter import harmonize_adapter

    arguments = {
        name: getattr(given, name)
        for name in ("adapter", "safety", "task", "out", "earlier", "base", "modules", "device")
    }
    if given.plan:
        from hpa_ext.compromise.estimate import plan_adapter

        plan = plan_adapter(**arguments, config=config)
        show_report(given, plan, plan.to_dict())
        return 0 if plan.fits else 2
    report = harmonize_adapter(**arguments, config=config, resume=given.resume, progress=not given.quiet)
    show_report(given, "" if given.quiet else f"{report}\n", report.to_dict(), last=f"written: {given.out}")
    return 0
