"""What ``hpa-ext hide`` does: calls the library and prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.cli.hide_inputs import cast, config_of, gather_anchors, load_model, named, open_image
from hpa_ext.hide.assembly import assign
from hpa_ext.hide.checks import check_parts
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import expert_modules
from hpa_ext.hide.export import export_adapter, fused_expert
from hpa_ext.hide.layer_cka import expert_cka
from hpa_ext.hide.loading import data_batches
from hpa_ext.hide.merging import acting_projector, merge_checkpoint
from hpa_ext.hide.parameters import expert_parameters, table_3
from hpa_ext.hide.persistence import add_expert, has_anchors, load_parts, read_settings, remove_expert, save_parts
from hpa_ext.hide.tensor_files import new_directory
from hpa_ext.models.skeleton import skeleton
from hpa_ext.reporting.table import format_table


def build(args: argparse.Namespace) -> int:
    """Adapters and anchors to a HiDe model."""
    adapters = named("--adapter", args.adapters)
    structure = skeleton(args.base)
    config = config_of(args, list(adapters))
    experts = [read_expert(task, source, structure) for task, source in adapters.items()]
    anchors = gather_anchors(args, list(adapters), adapters)
    check_parts(structure, expert_modules(structure), experts, anchors, config)
    structure.config.name_or_path = str(args.base)
    save_parts(args.out, experts, anchors, config, None if anchors is None else anchors.features, structure)
    print(f"written: {args.out} ({len(experts)} tasks: {', '.join(adapters)})")
    return 0


def add(args: argparse.Namespace) -> int:
    """One more task."""
    adapters = named("--adapter", args.adapters)
    if len(adapters) != 1:
        raise ValueError(f"--adapter: expected one task to add, got {len(adapters)}")
    ((task, source),) = adapters.items()
    settings = read_settings(args.model)
    structure = skeleton(args.base)
    expert = read_expert(task, source, structure)
    anchors = None
    if args.data or args.anchors is not None or has_anchors(args.model) or not settings["experts"]:
        anchors = gather_anchors(args, [task], adapters, settings["features"])
    add_expert(args.model, expert, structure, anchors, args.coefficient)
    print(f"written: {args.model} ({len(settings['experts']) + 1} tasks, {task!r} last)")
    return 0


def remove(args: argparse.Namespace) -> int:
    """One task less."""
    remove_expert(args.model, args.task)
    print(f"written: {args.model} (without {args.task!r})")
    return 0


def show(args: argparse.Namespace) -> int:
    """Tasks, settings, counts."""
    if args.model is not None:
        experts, anchors, config, settings = load_parts(args.model)
        rows = []
        for expert in experts:
            counts = ["-" if anchors is None else str(anchors.count(expert.task, kind)) for kind in ("image", "text")]
            ranks = sorted({update.rank for update in expert.updates.values()})
            rows.append(
                [
                    expert.task, str(len(expert.updates)), ", ".join(map(str, ranks)), f"{expert.parameter_count:,}",
                    "yes" if expert.projector else "no", *counts,
                ]
            )  # fmt: skip
        header = ("task", "linears", "rank", "parameters", "projector", "images", "texts")
        print(format_table(header, rows))
        print(f"\nsettings  {json.dumps(config.to_dict())}\nfeatures  {json.dumps(settings['features'])}")
        if args.base is not None:
            structure = skeleton(args.base)
            found = expert_parameters(experts, assign(structure, expert_modules(structure), experts, config))
            print("parameters  " + ", ".join(f"{name} {count:,}" for name, count in found.items()))
        print()
    rows = [[row.name, str(row.experts), f"{row.millions:.2f}", f"{row.paper_millions:.2f}"] for row in table_3()]
    print(format_table(("LLaVA-1.5-7B, 6 tasks, rank 8", "experts", "million", "table 3 of the paper"), rows))
    print(
        "The paper's ratios are those of the experts (its 44.27 for merge 1-31 is a slip: its factor is 0.84); its "
        "1.196 M for an expert do not fit rank 8, which has 0.625 M in a layer."
    )
    return 0


def route(args: argparse.Namespace) -> int:
    """Routing weights of prompts."""
    from hpa_ext.data.collate import collate_prompts
    from hpa_ext.data.samples import Sample

    if (args.data is None) == (args.text is None):
        raise ValueError("--text, --data: expected one of them")
    model, processor, _ = load_model(args)
    names: list[str] = []
    if args.text is not None:
        image = None if args.image is None else open_image(args.image)
        sample = Sample(image, args.text, "", modality="text" if image is None else "image")
        batches, names = [collate_prompts(processor, [sample])], [args.text]
        batches[0] = {key: cast(value, model.dtype) for key, value in batches[0].items()}
    else:
        batches = list(data_batches(args.data, processor, model.dtype, args.images, args.samples))
        names = [f"record {number}" for number in range(sum(len(batch["input_ids"]) for batch in batches))]
    on_device = ({key: value.to(model.device) for key, value in batch.items()} for batch in batches)
    weights = torch.cat([model.routing(**batch) for batch in on_device]).cpu()
    if args.json:
        print(json.dumps({"tasks": model.tasks, "weights": weights.tolist()}))
        return 0
    rows = [[name[:40], *(f"{value:.3f}" for value in row.tolist())] for name, row in zip(names, weights, strict=True)]
    print(format_table(("prompt", *model.tasks), rows))
    return 0


def cka(args: argparse.Namespace) -> int:
    """CKA between the experts, with pictures."""
    from hpa_ext.reporting.cka import plot_cka_curve, plot_cka_heat_maps

    model, processor, _ = load_model(args)

    def batches(path: str) -> list[dict[str, Any]]:
        return list(data_batches(path, processor, model.dtype, args.images, args.samples, args.batch_size))

    own = any("=" in entry for entry in args.data)
    if not own and len(args.data) > 1:
        raise ValueError(f"--data: expected one file, or TASK=FILE for every task, got {len(args.data)} files")
    data = {task: batches(path) for task, path in named("--data", args.data).items()} if own else batches(args.data[0])
    with new_directory(args.out) as out:
        found = expert_cka(model, data, pool=args.pool)
        title = "experts on their own data" if own else "experts on the same samples"
        plot_cka_heat_maps(found, out / "cka-heat-maps.png", f"Linear CKA between {title} (n = {found.samples})")
        plot_cka_curve(found, out / "cka-curve.png", f"Linear CKA between {title}, by layer")
        suggestion = found.suggest_top_layers()
        report = {
            "tasks": found.tasks, "layers": found.layers, "samples": found.samples, "pool": args.pool,
            "values": found.values.tolist(), "mean": found.curve().tolist(), "top_layers": suggestion.count,
            "reason": suggestion.reason,
        }  # fmt: skip
        (out / "cka.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = [[str(number + 1), f"{value:.4f}"] for number, value in enumerate(found.curve().tolist())]
    print(format_table(("layer", "mean CKA between tasks"), rows))
    print(f"\nsuggested top layers: {suggestion.count} ({suggestion.reason})\nwritten: {args.out}")
    return 0


def merge(args: argparse.Namespace) -> int:
    """A plain checkpoint."""
    merge_checkpoint(args.model, args.base, args.out, args.task, args.device)
    print(f"written: {args.out} ({'the fused part' if args.task is None else f'for {args.task!r}'})")
    return 0


def export(args: argparse.Namespace) -> int:
    """A PEFT adapter."""
    experts, _, config, settings = load_parts(args.model)
    if args.fused:
        if args.base is None:
            raise ValueError("--base: expected the base model with --fused, got none")
        weights = CheckpointWeights(args.base)
        assignments = assign(weights.model, expert_modules(weights.model), experts, config)
        expert = fused_expert(assignments, projector=acting_projector(weights, experts, config, None))
        weights.close()
    else:
        by_task = {expert.task: expert for expert in experts}
        if args.task not in by_task:
            raise ValueError(f"--task: expected one of {', '.join(by_task)}, got {args.task!r}")
        expert = by_task[args.task]
    export_adapter(expert, args.out, str(args.base or settings["base"]["name"]))
    print(f"written: {args.out}")
    return 0
