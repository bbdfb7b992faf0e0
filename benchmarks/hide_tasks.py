"""HiDe on the embedded model's six visual tasks: Last and Avg against tuning in sequence, and the paper's ablations.

    python benchmarks/hide_tasks.py WORK [--seeds 0,1,2] [--stages experts,hide,ablations,sequences]

Everything is kept under WORK, so that what ran before is not run again; ``hide_table.py`` prints the tables.
FineTune, O-LoRA and MoELoRA tune one model from task to task, in the same regime; further methods join `SEQUENTIAL`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hpa_ext.baselines.registry import method
from hpa_ext.baselines.tuning_step import StepContext
from hpa_ext.continual.metrics import continual_metrics
from hpa_ext.data.collate import collate_training
from hpa_ext.data.samples import Sample
from hpa_ext.data.toy_tasks import MODALITIES, draw_harmful, draw_task
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import accuracy, safety_score
from hpa_ext.hide import Anchors, HiDeConfig, HiDeModel, own_features
from hpa_ext.hide.ablations import ablations
from hpa_ext.hide.structure import layer_count
from hpa_ext.models.embedded import load_embedded
from hpa_ext.training.hide_expert import ANCHORS_FILE, ExpertSchedule, save_expert, train_expert
from hpa_ext.training.loop import TrainingSettings, train
from hpa_ext.training.lora import add_lora

TASKS = ("kind", "material", "sentence", "arithmetic", "reading", "compass")
# Chosen so that each task is learnt alone to about 95 % or more; on seed 100, which is not reported.
TRAIN_COUNT, STEPS, BATCH, RATE, PROJECTOR_RATE, PRECISION = 1500, 300, 16, 1e-3, 1e-4, "bfloat16"
TEST_COUNT, SAFETY_COUNT = 60, 48
# Three orders, as table 4 has: letters are the tasks' first ones ("k m s a r c").
ORDERS = {"KMSARC": (0, 1, 2, 3, 4, 5), "ACRMKS": (3, 5, 4, 1, 0, 2), "SRKCAM": (2, 4, 0, 5, 3, 1)}


MAIN_ABLATIONS = (
    "HiDe", "merge all", "merge lower", "expand all", "expand lower", "image alone", "text alone", "factors",
    "batch routing", "authors", "fusion coefficient 0.2", "fusion coefficient 0.4", "projector last",
    "projector routed", "top layers 2", "top layers 3", "top layers 2, fusion coefficient 0.4",
    "top layers 3, fusion coefficient 0.4", "expand all, projector routed", "expand all, batch routing",
    "top layers 3, fusion coefficient 0.4, factors",
)  # fmt: skip


def schedule(seed: int) -> ExpertSchedule:
    """The expert's training: HiDe's schedule with rates and steps for a model of 3 M parameters."""
    return ExpertSchedule(
        batch_size=BATCH,
        learning_rate=RATE,
        projector_learning_rate=PROJECTOR_RATE,
        max_steps=STEPS,
        seed=seed,
        precision=PRECISION,
    )


def expert_directory(work: Path, seed: int, task: str) -> Path:
    """Where the adapter of a task lies, with its anchors."""
    return work / f"seed-{seed}" / "experts" / task


def train_experts(work: Path, seed: int, say: Callable[[str], None]) -> None:
    """One adapter for each task, each from the base."""
    for task in TASKS:
        directory = expert_directory(work, seed, task)
        if (directory / ANCHORS_FILE).is_file():
            continue
        model, processor = tunable()
        features = own_features(model, processor.tokenizer)
        anchors = Anchors(features.describe())
        samples = draw_task(task, TRAIN_COUNT, seed)
        expert = train_expert(
            model, task, samples, functools.partial(collate_training, processor), schedule(seed), anchors, features
        )
        score = accuracy(*answers(expert.model, processor, test_set(task, seed)))
        directory.parent.mkdir(parents=True, exist_ok=True)
        save_expert(expert, directory, anchors)
        say(f"seed {seed}: expert of {task}: {expert.log}; alone {score:.1f} %")


def finetune(
    model: torch.nn.Module, processor: Any, task: str, seed: int, step: int, memory: dict[str, Any]
) -> torch.nn.Module:
    """FineTune: one LoRA that is trained on from task to task."""
    model = model if step else add_lora(model, 8, 16.0, seed=seed)
    collate = functools.partial(collate_training, processor)
    train(model, draw_task(task, TRAIN_COUNT, seed), collate, sequence_settings(seed, step))
    return model


def from_baselines(name: str, **settings: Any) -> Callable[..., torch.nn.Module]:
    """A method that changes the tuning, from `hpa_ext.baselines`, in the same regime."""

    def tune(model: torch.nn.Module, processor: Any, task: str, seed: int, step: int, memory: dict[str, Any]):
        found = method(name)
        tuning = memory.setdefault("tuning", found.function(**{**found.settings, **settings}))
        collate = functools.partial(collate_training, processor)
        samples = draw_task(task, TRAIN_COUNT, seed)
        context = StepContext(step, 10 * seed + step, 8, 16.0, samples, collate)
        model = tuning.attach(model, context)
        rate = RATE * tuning.learning_rate_factor
        train(model, samples, collate, sequence_settings(seed, step, rate), plugins=[tuning])
        return tuning.finish(model, context)

    return tune


SEQUENTIAL: dict[str, Callable[..., torch.nn.Module]] = {
    "FineTune": finetune,
    "O-LoRA": from_baselines("o-lora"),
    "MoELoRA": from_baselines("moelora", experts=4),
}
"""Methods that tune one model from task to task: ``method(model, processor, task, seed, step, memory) -> model``, with
``memory`` kept between the steps of one sequence. Others register here."""


def tunable() -> tuple[torch.nn.Module, Any]:
    """The embedded model to be tuned, frozen; at 40 tokens plain attention is faster on a CPU than the fused one."""
    model, processor = load_embedded()
    model.set_attn_implementation("eager")
    return model.requires_grad_(False), processor


def sequence_settings(seed: int, step: int, rate: float = RATE) -> TrainingSettings:
    """The tuning of one step."""
    return TrainingSettings(
        steps=STEPS, batch_size=BATCH, learning_rate=rate, warmup_steps=6, seed=seed + step, precision=PRECISION
    )


def run_sequence(work: Path, name: str, seed: int, order: str, say: Callable[[str], None]) -> None:
    """The scores of a sequential method after each step on every task, in percent."""
    path = work / f"seed-{seed}" / f"{name}-{order}.json"
    if path.is_file():
        return
    model, processor = tunable()
    scores, memory = [], {}
    for step, number in enumerate(ORDERS[order]):
        model = SEQUENTIAL[name](model, processor, TASKS[number], seed, step, memory)
        scores.append(task_scores(model, processor, seed, [TASKS[i] for i in ORDERS[order][: step + 1]]))
    attacked = masr(model, processor, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"tasks": [TASKS[i] for i in ORDERS[order]], "scores": scores, "masr": attacked}
    path.write_text(json.dumps(found) + "\n")
    say(f"seed {seed}: {name} {order}: {shown(scores)}, MASR {attacked:.1f}")


def shown(scores: Sequence[Sequence[float]]) -> str:
    """Last, Avg and BWT of a sequence."""
    found = continual_metrics(scores)
    return ", ".join(f"{name} {found[name]:.1f}" for name in ("Last", "Avg", "BWT"))


def test_set(task: str, seed: int) -> list[Sample]:
    """Held-out samples of a task."""
    return draw_task(task, TEST_COUNT, seed, "test")


def answers(model: torch.nn.Module, processor: Any, samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Answers and ground truths."""
    return generate_answers(model, processor, samples, max_new_tokens=12), [sample.answer for sample in samples]


def task_scores(
    model: torch.nn.Module, processor: Any, seed: int, tasks: Sequence[str], mixed: bool = True
) -> list[float]:
    """Accuracy on each task, the prompts of all tasks in mixed batches, or each task's in batches of their own."""
    sets = {task: test_set(task, seed) for task in tasks}
    if not mixed:
        return [accuracy(*answers(model, processor, samples)) for samples in sets.values()]
    # One of each task in turn, so that every batch holds them all.
    samples = [sets[task][row] for row in range(TEST_COUNT) for task in tasks]
    given, truth = answers(model, processor, samples)
    count = len(tasks)
    return [accuracy(given[i::count], truth[i::count]) for i in range(count)]


def masr(model: torch.nn.Module, processor: Any, seed: int) -> float:
    """Mean attack success rate over the three safety sets, in percent."""
    prompts = {name: draw_harmful(name, SAFETY_COUNT, seed, "test") for name in MODALITIES}
    return safety_score({name: generate_answers(model, processor, given) for name, given in prompts.items()}).masr


def load_experts(work: Path, seed: int, tasks: Sequence[str]) -> tuple[dict[str, Path], Anchors]:
    """Adapters and anchors in this order."""
    anchors = Anchors()
    for task in tasks:
        anchors.merge_(Anchors.load(expert_directory(work, seed, task) / ANCHORS_FILE))
    return {task: expert_directory(work, seed, task) for task in tasks}, anchors


def hide_model(work: Path, seed: int, tasks: Sequence[str], config: HiDeConfig | None = None) -> tuple[HiDeModel, Any]:
    """A HiDe model of these tasks, in this order."""
    base, processor = load_embedded()
    adapters, anchors = load_experts(work, seed, tasks)
    features = own_features(base, processor.tokenizer)
    return HiDeModel(base, adapters, anchors, config, features=features), processor


def hide_sequences(work: Path, seed: int, say: Callable[[str], None]) -> None:
    """HiDe task by task in each order: Last and Avg."""
    for order, numbers in ORDERS.items():
        path = work / f"seed-{seed}" / f"HiDe-{order}.json"
        if path.is_file():
            continue
        tasks = [TASKS[number] for number in numbers]
        adapters, anchors = load_experts(work, seed, tasks)
        model, processor = hide_model(work, seed, tasks[:1])
        scores = []
        for step, task in enumerate(tasks):
            if step:
                model.add(task, adapters[task], anchors)
            scores.append(task_scores(model, processor, seed, tasks[: step + 1]))
        path.write_text(json.dumps({"tasks": tasks, "scores": scores}) + "\n")
        say(f"seed {seed}: HiDe {order}: {shown(scores)}")


def hide_ablations(work: Path, seed: int, say: Callable[[str], None], only_main: bool = False) -> None:
    """Last of every ablation (or of the main ones), on mixed batches and on batches of one task."""
    path = work / f"seed-{seed}" / "ablations.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    model, processor = hide_model(work, seed, TASKS)
    settings = ablations(layer_count(model.model))
    for how in ("mean", "last", "routed", "base"):
        settings[f"projector {how}"] = model.config.replace(projector=how)
    for count in (2, 3):
        settings[f"top layers {count}"] = model.config.replace(top_layers=count)
        settings[f"top layers {count}, fusion coefficient 0.4"] = model.config.replace(
            top_layers=count, fusion_coefficients=0.4
        )
    settings["expand all, projector routed"] = settings["expand all"].replace(projector="routed")
    settings["expand all, batch routing"] = settings["expand all, projector routed"].replace(routing="batch")
    settings["top layers 3, fusion coefficient 0.4, factors"] = model.config.replace(
        top_layers=3, fusion_coefficients=0.4, fusion="factors"
    )
    settings["authors, one task a batch"] = settings["authors"]
    settings["batch routing, one task a batch"] = settings["batch routing"]
    for name, config in settings.items():
        if name in found or (only_main and name not in MAIN_ABLATIONS):
            continue
        model.configure(config)
        scores = task_scores(model, processor, seed, TASKS, mixed="one task a batch" not in name)
        found[name] = {"scores": scores, "parameters": model.parameter_count()}
        path.write_text(json.dumps(found) + "\n")
        say(f"seed {seed}: {name}: Last {sum(scores) / len(scores):.1f}")


def main() -> int:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for adapters and results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--stages", default="experts,hide,ablations,sequences")
    parser.add_argument("--methods", default=",".join(SEQUENTIAL), help="sequential methods (default: %(default)s)")
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--main-ablations", action="store_true", help="leave the others out")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:7.0f} s] {text}", flush=True)

    stages = arguments.stages.split(",")
    unknown = sorted(set(stages) - {"experts", "hide", "ablations", "sequences"})
    if unknown:
        print(f"--stages: unknown {unknown[0]!r}", file=sys.stderr)
        return 2
    for seed in map(int, arguments.seeds.split(",")):
        if "experts" in stages:
            train_experts(arguments.work, seed, say)
        if "hide" in stages:
            hide_sequences(arguments.work, seed, say)
        if "ablations" in stages:
            hide_ablations(arguments.work, seed, say, arguments.main_ablations)
        if "sequences" in stages:
            for name in arguments.methods.split(","):
                for order in arguments.orders.split(","):
                    run_sequence(arguments.work, name, seed, order, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
