"""``hpa-ext hide``: experts of several tasks in one model, from plain PEFT adapters."""

from __future__ import annotations

import argparse
from pathlib import Path

_DESCRIPTION = (
    "HiDe (ACL 2025): one LoRA expert per task, fused into the weights below and routed for each sample on top. A HiDe "
    "model on disk is a directory with the experts, the anchors and the settings; the base model stays where it is."
)
_FEATURES = (
    "Prompts are routed by features. Without --clip these are the model's own: its vision tower's pooled output, and "
    "the mean embedding of the prompt's tokens. With --clip they are CLIP's, as in the paper."
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command and what it can do."""
    parser = subparsers.add_parser(
        "hide", help="experts per task: fused below, routed on top", description=_DESCRIPTION,
        epilog="Exit code: 0 done, 1 the numbers failed, 2 the input does not fit, 130 interrupted.",
    )  # fmt: skip
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for add in (_build, _add, _remove, _show, _route, _cka, _merge, _export):
        add(actions)


def _build(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "build", help="put adapters together",
        description="Puts PEFT LoRA adapters, one per task and in this order, together with their anchors and writes "
        "a HiDe model. Adapters that `hpa-ext adapter` or `hpa-ext harmonize --output adapter` made safer go in like "
        "any other. Anchors come from --data, from --anchors, or from hide_anchors.safetensors in each adapter's "
        "directory, where training leaves them. " + _FEATURES,
    )  # fmt: skip
    _base(parser)
    parser.add_argument(
        "--adapter", action="append", required=True, metavar="TASK=DIR", dest="adapters", help="one for each task"
    )
    _anchors(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    _settings(parser)
    _run(parser, "build")


def _add(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "add", help="put one more task into a HiDe model",
        description="Writes one more expert into the directory of a HiDe model, in place. " + _FEATURES,
    )  # fmt: skip
    _model(parser)
    _base(parser)
    parser.add_argument(
        "--adapter", action="append", required=True, metavar="TASK=DIR", dest="adapters", help="the new task's"
    )
    _anchors(parser)
    parser.add_argument("--coefficient", type=float, metavar="X", help="its fusion coefficient")
    _run(parser, "add")


def _remove(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("remove", help="take a task out of a HiDe model, in place")
    _model(parser)
    parser.add_argument("--task", required=True, metavar="TASK", help="which one")
    _run(parser, "remove")


def _show(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("show", help="tasks, settings and parameter counts, beside the paper's")
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="directory of a HiDe model")
    parser.add_argument("--base", type=Path, metavar="DIR", help="its base model, for the counts")
    _run(parser, "show")


def _route(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "route", help="show the routing weights of prompts",
        description="Prints how much each task's expert counts for prompts, from --text and --image, or from --data. "
        "Of the model only the vision tower runs. " + _FEATURES,
    )  # fmt: skip
    _model(parser)
    _base(parser)
    parser.add_argument("--text", metavar="TEXT", help="the instruction")
    parser.add_argument("--image", type=Path, metavar="FILE", help="its image")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts: LLaVA JSON, chat JSON or JSONL")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --data")
    parser.add_argument("--samples", type=int, metavar="N", help="draw so many of --data")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _clip(parser)
    _device(parser)
    _run(parser, "route")


def _cka(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "cka", help="compare the experts layer by layer, and suggest the number of top layers",
        description="Linear CKA of every decoder layer's output between the experts, each alone on the base, over the "
        "same samples; writes cka.json, cka-heat-maps.png and cka-curve.png, and says how many top layers stand out. "
        "With TASK=FILE for every task each expert runs on its own data, which is the paper's figure; its samples "
        "are then paired by position alone.",
    )  # fmt: skip
    _model(parser)
    _base(parser)
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE or TASK=FILE", help="samples; more is better"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --data")
    parser.add_argument("--samples", type=int, metavar="N", help="draw so many of each file")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples a batch (default: 8)")
    parser.add_argument("--pool", choices=("mean", "last", "tokens"), default="mean", help="what a row is: a sample's "
                        "mean over tokens (default, the authors'), its last token, or every token")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    _clip(parser)
    _device(parser)
    _run(parser, "cka")


def _merge(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "merge", help="write a plain checkpoint",
        description="Merges a HiDe model into a checkpoint that needs nothing of this library: the fused layers as "
        "they are, and in the routed ones the expert of --task, or none with --fused. The result has the base's files, "
        "names and dtypes; a tensor at a time is in memory.",
    )  # fmt: skip
    _model(parser)
    _base(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="TASK", help="whose expert goes into the routed layers")
    which.add_argument("--fused", action="store_true", help="leave the routed layers as in the base")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to compute (default: cpu)")
    _run(parser, "merge")


def _export(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "export", help="write an expert, or the fused part, as a PEFT adapter",
        description="Writes one task's expert as it came in, or the sum of the fused layers as one adapter whose "
        "rank is that of all experts together, with the projector that acts beside them.",
    )  # fmt: skip
    _model(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="TASK", help="whose expert")
    which.add_argument("--fused", action="store_true", help="the fused layers; needs --base")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the base model, whose layers decide what is fused")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    _run(parser, "export")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of a HiDe model")


def _base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model, in safetensors")


def _anchors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--anchors", type=Path, metavar="FILE", help="anchors of the tasks")
    parser.add_argument(
        "--data", action="append", default=[], metavar="TASK=FILE",
        help="a task's training data, to gather its anchors: LLaVA JSON, chat JSON or JSONL",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --data")
    parser.add_argument("--samples", type=int, metavar="N", help="draw so many of each file; all by default")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples a batch (default: 8)")
    parser.add_argument(
        "--image-feature", choices=("pooled", "projected", "mean"),
        help="with --data: of the vision tower (default: projected with --clip, as the authors; else pooled)",
    )  # fmt: skip
    parser.add_argument(
        "--text-feature", choices=("pooled", "projected"),
        help="with --data and --clip: of CLIP's text tower (default: pooled, as the authors)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-part", choices=("instruction", "prompt"), default="instruction",
        help="with --data and --clip: the text that counts (default: instruction, as the authors)",
    )  # fmt: skip
    _clip(parser)
    _device(parser)


def _clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", type=Path, metavar="DIR", help="the CLIP model that the vision tower comes from")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to compute (default: cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the computation; that of the file by default"
    )


def _settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (defaults are the paper's)")
    group.add_argument("--top-layers", type=int, default=1, metavar="N", help="routed layers from the top")
    group.add_argument("--image-weight", type=float, default=0.5, metavar="X", help="alpha")
    group.add_argument("--text-weight", type=float, default=0.5, metavar="X", help="beta")
    group.add_argument("--temperature", type=float, default=0.1, metavar="X", help="T")
    group.add_argument("--fusion", choices=("delta", "factors"), default="delta", help="exact, or the authors'")
    group.add_argument("--routing", choices=("sample", "batch"), default="sample", help="per sample, or the authors'")
    group.add_argument(
        "--coefficient", action="append", default=[], metavar="X or TASK=X", dest="coefficients",
        help="fusion coefficient, of all tasks or of one; may be repeated",
    )  # fmt: skip
    group.add_argument("--top-role", choices=("routed", "fused", "none"), default="routed")
    group.add_argument("--lower-role", choices=("routed", "fused", "none"), default="fused")
    group.add_argument("--projector", choices=("fused", "mean", "last", "routed", "base"), default="fused")


def _run(parser: argparse.ArgumentParser, action: str) -> None:
    def run(args: argparse.Namespace) -> int:
        # Imported late: transformers takes seconds, and `hpa-ext --help` should not.
        from hpa_ext.cli import hide_actions

        return getattr(hide_actions, action)(args)

    parser.set_defaults(run=run)
