"""HiDe and harmonizing on the embedded model: Last and MASR of HiDe alone, HPA alone, and HiDe with either method.

    python benchmarks/hide_safety.py WORK [--seeds 0,1,2] [--parts hide,compromise,hpa]

WORK is that of ``hide_tasks.py``, whose experts are used and whose FineTune stands beside them. "HPA" is FineTune from
task to task with every step harmonized; "+ HPA" and "+ compromise" harmonize each expert before it is fused or routed,
"others protected" with the task Grams of the other experts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hide_tasks import (
    SEQUENTIAL,
    TASKS,
    TRAIN_COUNT,
    hide_model,
    load_experts,
    masr,
    task_scores,
    train_experts,
    tunable,
)

from hpa_ext import CompromiseConfig, GramCollection, calibrate, harmonize_model
from hpa_ext.data.collate import calibration_batches
from hpa_ext.data.safety_set import collect_safety_set
from hpa_ext.data.samples import Sample
from hpa_ext.data.toy_tasks import RISK_CLASSES, draw_harmful, draw_task
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS
from hpa_ext.hide import HiDeConfig, HiDeModel, harmonize_experts
from hpa_ext.hide.expert_sources import read_expert
from hpa_ext.hide.experts import Expert
from hpa_ext.models.embedded import load_embedded

CONFIGS = {
    "HiDe": HiDeConfig(),
    "HiDe, top layers 3, e 0.4": HiDeConfig(top_layers=3, fusion_coefficients=0.4),
    "HiDe, expand all": HiDeConfig(top_layers=4, projector="routed"),
}
MORE_CONFIGS = {
    "HiDe, projectors routed": HiDeConfig(projector="routed"),
    "HiDe, top layers 3": HiDeConfig(top_layers=3),
    "HiDe, top layers 3, projectors routed": HiDeConfig(top_layers=3, projector="routed"),
}
"""Where experts that protect each other leave room for more than the paper's setting: with coefficients of 1."""


def safety_samples(model: torch.nn.Module, processor: Any, seed: int) -> list[Sample]:
    """Harmful prompts with the refusals that the aligned model writes itself, 8 samples."""
    found = collect_safety_set(
        lambda samples: generate_answers(model, processor, samples),
        lambda risk: iter(draw_harmful("both", 64, seed, "train", risk_class=risk)),
        DEFAULT_REFUSALS.matches,
        RISK_CLASSES,
    )
    return found.samples


def safety_grams(model: torch.nn.Module, processor: Any, samples: list[Sample]) -> GramCollection:
    """Grams of the safety samples through a model."""
    return calibrate(model, calibration_batches(processor, samples), progress=False)


def task_grams(model: torch.nn.Module, processor: Any, task: str, seed: int) -> GramCollection:
    """Grams of 128 samples of a task."""
    samples = draw_task(task, TRAIN_COUNT, seed)[:128]
    return calibrate(model, calibration_batches(processor, samples, 32), progress=False)


def hpa_sequence(seed: int) -> dict[str, Any]:
    """FineTune in the first order, every step harmonized, with the refusals of the aligned model before all of them."""
    model, processor = tunable()
    refusals = safety_samples(model, processor, seed)
    memory: dict[str, Any] = {}
    for step, task in enumerate(TASKS):
        old = copy.deepcopy(model)
        model = SEQUENTIAL["FineTune"](model, processor, task, seed, step, memory)
        safety = safety_grams(old, processor, refusals)
        harmonize_model(old, model, safety, task_grams(model, processor, task, seed))
    return {"HPA": {"scores": task_scores(model, processor, seed, TASKS), "masr": masr(model, processor, seed)}}


def expert_grams(
    work: Path, seed: int
) -> tuple[torch.nn.Module, list[Expert], GramCollection, dict[str, GramCollection]]:
    """The base, its experts, the safety Grams of the base, and the task Grams of the base with each expert."""
    base, processor = load_embedded()
    adapters, _ = load_experts(work, seed, TASKS)
    experts = [read_expert(task, source, base) for task, source in adapters.items()]
    safety = safety_grams(base, processor, safety_samples(base, processor, seed))
    grams = {}
    for expert in experts:
        single = HiDeModel(load_embedded()[0], {expert.task: expert}, config=HiDeConfig(top_layers=0))
        grams[expert.task] = task_grams(single.merge_and_unload(), processor, expert.task, seed)
    return base, experts, safety, grams


def measured(work: Path, seed: int, config: HiDeConfig, experts: list[Expert] | None = None) -> dict[str, Any]:
    """Accuracies and MASR of a configuration with these experts; None for those on disk."""
    model, processor = hide_model(work, seed, TASKS)
    if experts is not None:
        anchors, features = model.anchors, model.features
        model = HiDeModel(load_embedded()[0], {e.task: e for e in experts}, anchors, features=features)
    model.configure(config)
    return {"scores": task_scores(model, processor, seed, TASKS), "masr": masr(model, processor, seed)}


def hide_with_and_without(work: Path, seed: int) -> dict[str, Any]:
    """Every configuration with plain experts and with experts harmonized by HPA."""
    base, processor = load_embedded()
    found = {"base": {"scores": task_scores(base, processor, seed, TASKS), "masr": masr(base, processor, seed)}}
    harmonized, _ = harmonize_experts(*expert_grams(work, seed), progress=False)
    for name, config in CONFIGS.items():
        found[name] = measured(work, seed, config)
        found[f"{name} + HPA"] = measured(work, seed, config, harmonized)
    return found


def hide_with_compromise(work: Path, seed: int) -> dict[str, Any]:
    """Every configuration with experts harmonized by the compromise at its defaults, and more configurations.

    "Others protected" is left out where nothing is fused: it is then the same. "Others alone" has a strength of 0, so
    that only the other tasks are protected and not the safety set.
    """
    given = expert_grams(work, seed)
    by_hpa, _ = harmonize_experts(*given, progress=False)
    alone, _ = harmonize_experts(*given, CompromiseConfig(), progress=False)
    found = {}
    for name, config in (CONFIGS | MORE_CONFIGS).items():
        if name in MORE_CONFIGS:
            found[name] = measured(work, seed, config)
            found[f"{name} + HPA"] = measured(work, seed, config, by_hpa)
        found[f"{name} + compromise"] = measured(work, seed, config, alone)
        if config.top_layers == 4:
            continue
        for suffix, settings in (
            ("compromise, others protected", CompromiseConfig()),
            ("others alone protected", CompromiseConfig(strength=0.0)),
        ):
            protecting, _ = harmonize_experts(*given, settings, progress=False, protect_others=config)
            found[f"{name} + {suffix}"] = measured(work, seed, config, protecting)
    return found


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "hide": hide_with_and_without,
    "compromise": hide_with_compromise,
    "hpa": lambda work, seed: hpa_sequence(seed),
}
"""What is measured, each into a file of its own: HiDe with and without HPA, with the compromise, and HPA alone."""


def main() -> int:
    """Run for every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of hide_tasks.py")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of these (default: all): %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    started = time.perf_counter()
    say: Callable[[str], None] = functools.partial(print, flush=True)
    for seed in map(int, arguments.seeds.split(",")):
        train_experts(arguments.work, seed, say)
        for part in arguments.parts.split(","):
            path = arguments.work / f"seed-{seed}" / f"safety_{part}.json"
            if path.is_file():
                continue
            found = PARTS[part](arguments.work, seed)
            path.write_text(json.dumps(found) + "\n")
            for name, row in found.items():
                last, seconds = sum(row["scores"]) / len(row["scores"]), time.perf_counter() - started
                say(f"[{seconds:6.0f} s] seed {seed}: {name}: Last {last:.1f}, MASR {row['masr']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
