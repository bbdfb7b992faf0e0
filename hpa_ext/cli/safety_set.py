"""``hpa-ext safety-set``: the aligned model's own refusals, as calibration samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpa_ext.cli.settings import SettingsParser, positive

_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "safety-set",
        help="let the aligned model answer harmful prompts, and keep its refusals as a calibration set",
        description="Gives harmful prompts to the model before tuning and writes those that it refuses, with the "
        "refusals as answers, as LLaVA JSON for `hpa-ext calibrate`. An answer that is no refusal is no calibration "
        "sample: it is thrown out and another prompt is tried. If the records name a risk_class, the set is spread "
        "over the classes evenly. Answers that the records have are ignored.",
        epilog="Images inside the folder of OUT keep their place; others are copied beside it. Exit code: 0 done, 1 if "
        "the model refuses too little, 2 if the input does not fit.",
    )
    settings = SettingsParser(parser)
    settings.add("--model", type=Path, required=True, metavar="DIR", help="the model before tuning")
    settings.add("--data", type=Path, required=True, metavar="FILE", help="harmful prompts, as for calibrate")
    settings.add("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    settings.add("--images", type=Path, metavar="DIR", help="folder of the images; the data file's own by default")
    settings.add(
        "--adapter", type=Path, action="append", default=[], metavar="DIR", dest="adapters",
        help="LoRA adapter that belongs to the model before tuning; may be repeated",
    )  # fmt: skip
    settings.add("--size", type=positive, default=8, metavar="N", help="samples to write")
    settings.add("--seed", type=int, default=0, metavar="N", help="of the order in which prompts are tried")
    settings.add("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer")
    settings.add("--batch-size", type=positive, default=8, metavar="N", help="prompts at a time")
    settings.add(
        "--refusals", type=Path, metavar="FILE",
        help="text file with a phrase a line that makes an answer a refusal; the built-in list by default",
    )  # fmt: skip
    settings.add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1")
    settings.add("--dtype", choices=_DTYPES, help="of the computation; that of the file by default")
    settings.add("--processor", type=Path, metavar="DIR", help="folder of the processor; the model's own by default")
    settings.add("--force", action="store_true", default=False, help="write over an existing file")
    settings.add("--quiet", action="store_true", default=False, help="no progress and no summary")
    parser.set_defaults(run=run, settings=settings)


def run(args: argparse.Namespace) -> int:
    """Generate, keep the refusals, write."""
    given = args.settings.resolve(args)
    if given.out.exists() and not given.force:
        raise FileExistsError(f"--out: {given.out} exists; --force writes over it")
    # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
    import torch
    from transformers.utils import logging

    from hpa_ext.calibrating import load_processor
    from hpa_ext.calibrating.safety_set import refused_prompts
    from hpa_ext.data.llava_json import write_llava_json
    from hpa_ext.data.records import load_conversations
    from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS, RefusalList

    logging.set_verbosity_error()
    refusals = DEFAULT_REFUSALS
    if given.refusals is not None:
        lines = given.refusals.read_text(encoding="utf-8").splitlines()
        refusals = RefusalList(given.refusals.name, tuple(line for line in lines if line.strip()))
    found = refused_prompts(
        given.model,
        load_conversations(given.data, given.images),
        size=given.size,
        seed=given.seed,
        refusals=refusals,
        processor=load_processor(given.processor or given.model),
        adapters=given.adapters,
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
        device=given.device,
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        progress=not given.quiet,
    )
    write_llava_json(given.out, found.conversations)
    if not given.quiet:
        print(f"written: {given.out}: {len(found.conversations)} refusals ({found.by_class()}; list {refusals.id})")
        print(f"thrown out as no refusals: {len(found.thrown_out)} of {found.tried} answers")
        for conversation, answer in found.thrown_out[:3]:
            print(f"  {conversation.id}: {answer[:100]!r}")
    return 0
