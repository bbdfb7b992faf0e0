"""``hpa-ext calibrate``: the Grams of a model on disk over a folder of samples."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hpa_ext.cli.settings import SettingsParser, memory_size, positive

_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="run samples through a model on disk and write the Grams of its linears",
        description="Runs samples through a checkpoint (with LoRA adapters, if given) and writes, for the input of "
        "each linear layer of the decoder, the second moment that `hpa-ext harmonize` needs. Run it twice: the safety "
        "set through the model before tuning, the task's samples through the model after it (the same --model with "
        "--adapter). The model is loaded whole if it fits, and a layer at a time otherwise; both give the same Grams. "
        "Until all is written the output lies in OUT.partial; --resume goes on with it.",
        epilog="Data: LLaVA JSON, a list of {id, image (a path or a list of them), conversations: [{from: human|gpt, "
        "value}]} with <image> where an image goes; or JSON or JSONL of {messages: [{role, content}]} with content as "
        "chat templates take it; or a directory that the datasets library saved. Without `image` a record is text "
        "alone. Exit code: 0 done, 1 the numbers or a process failed, 2 the input does not fit, 130 interrupted. On "
        "several processes, each with its share of the samples: torchrun --nproc-per-node N --no-python hpa-ext "
        "calibrate ...",
    )
    settings = SettingsParser(parser)
    settings.add("--model", type=Path, required=True, metavar="DIR", help="checkpoint in safetensors")
    settings.add("--data", type=Path, required=True, metavar="FILE", help="the samples")
    settings.add("--out", type=Path, required=True, metavar="FILE", help="Gram file to make, .safetensors")
    settings.add(
        "--adapter", type=Path, action="append", default=[], metavar="DIR", dest="adapters",
        help="LoRA adapter; may be repeated, in the order of the steps",
    )  # fmt: skip
    settings.add("--images", type=Path, metavar="DIR", help="folder of the images; the data file's own by default")
    settings.add("--samples", type=positive, metavar="N", help="draw so many records; all by default")
    settings.add("--seed", type=int, default=0, metavar="N", help="of the drawing")
    settings.add(
        "--token-mask", choices=("attended", "all", "prompt", "image", "response"), default="attended",
        help="tokens that count: attended (no padding), all, prompt, image, or response (the answers)",
    )  # fmt: skip
    settings.add(
        "--reduce", choices=("diagonal",),
        help="keep only the diagonals of the inverse Grams: megabytes instead of gigabytes, and all that HPA needs",
    )  # fmt: skip
    settings.add(
        "--damping", type=float, default=0.01, metavar="X",
        help="of --reduce diagonal, relative to the mean of a Gram's diagonal; harmonize with the same",
    )  # fmt: skip
    settings.add("--modules", metavar="REGEX", help="linear layers, by whole name; all of the decoder by default")
    settings.add(
        "--mode", choices=("auto", "whole", "layers"), default="auto",
        help="load the model whole, or a decoder layer at a time",
    )  # fmt: skip
    settings.add("--batch-size", type=positive, default=1, metavar="N", help="samples a batch; 1 needs no padding")
    settings.add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1; under torchrun cuda is each's own")
    settings.add("--dtype", choices=_DTYPES, help="of the computation; that of the file by default")
    settings.add(
        "--gram-memory", type=memory_size, metavar="SIZE",
        help="for Grams in --mode whole, such as 4G; more passes with less; a quarter of what is free by default",
    )  # fmt: skip
    settings.add("--processor", type=Path, metavar="DIR", help="folder of the processor; the model's own by default")
    settings.add("--resume", action="store_true", default=False, help="go on with an interrupted run")
    settings.add("--quiet", action="store_true", default=False, help="no progress and no summary")
    parser.set_defaults(run=run, settings=settings)


def run(args: argparse.Namespace) -> int:
    """Calibrate, then say what was counted."""
    given = args.settings.resolve(args)
    # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
    import torch
    from transformers.utils import logging

    from hpa_ext.calibrating import calibrate_checkpoint, load_processor
    from hpa_ext.data.records import load_conversations
    from hpa_ext.processes import Processes, torchrun_processes

    logging.set_verbosity_error()
    under_torchrun = "RANK" in os.environ
    device = given.device
    if under_torchrun and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    started = time.monotonic()
    with torchrun_processes() if under_torchrun else nullcontext():
        processes = Processes.current()

        def prepare() -> tuple[Any, Any]:
            samples = load_conversations(given.data, given.images, given.samples, given.seed)
            return samples, load_processor(given.processor or given.model)

        samples, processor = processes.together(prepare)
        try:
            stored = calibrate_checkpoint(
                given.model,
                samples,
                given.out,
                given.adapters,
                modules=given.modules,
                mode=given.mode,
                token_mask=given.token_mask,
                batch_size=given.batch_size,
                reduce=given.reduce,
                damping=given.damping,
                processor=processor,
                device=device,
                dtype=getattr(torch, given.dtype) if given.dtype else None,
                gram_memory=given.gram_memory,
                resume=given.resume,
                progress=not given.quiet,
            )
        except KeyboardInterrupt:
            how = f"interrupted; {given.out}.partial is unfinished, and the same command with --resume goes on"
            raise KeyboardInterrupt(how) from None
        if processes.is_first and not given.quiet:
            print(_summary(stored, samples, time.monotonic() - started))
    return 0


def _summary(stored: Any, samples: Any, seconds: float) -> str:
    tokens = sorted({stored.token_count(name) for name in stored})
    counted = str(tokens[0]) if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    size = stored.path.stat().st_size
    return (
        f"written: {stored.path} ({size / 1e6:.1f} MB, {stored.form})\n"
        f"{len(stored)} modules, {len(stored.groups)} Grams, {counted} tokens of {len(samples)} samples, "
        f"{seconds:.0f} s"
    )
