"""The main job on the embedded model, start to end: tune, erode, calibrate, harmonize, save, reload, evaluate."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hpa_ext.calibration import calibrate
from hpa_ext.data.collate import calibration_batches, collate_training
from hpa_ext.data.safety_set import SafetySet, collect_safety_set
from hpa_ext.data.toy_tasks import RISK_CLASSES, draw_harmful, draw_task
from hpa_ext.evaluation.embedded import EvaluationResult, draw_evaluation_sets, evaluate_embedded
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS
from hpa_ext.hpa import HPAConfig, ModelReport, harmonize_model
from hpa_ext.models.embedded import load_embedded
from hpa_ext.reporting.retained import plot_retained_columns
from hpa_ext.training.demo_settings import DemoSettings
from hpa_ext.training.loop import train
from hpa_ext.training.lora import add_lora

STAGES = ("before tuning", "after tuning", "after HPA")

# Prompts of each risk class that may be tried before the safety set is given up.
_SAFETY_CANDIDATES = 64


@dataclass
class DemoResult:
    """What one seed gave.

    Attributes:
        seed: of the data, the adapter and the order of training.
        scores: an `EvaluationResult` for each of `STAGES`; the last one is of the model read back from disk.
        report: what harmonizing did to each layer.
        thrown_out: answers of the aligned model to safety prompts that were no refusals, and so were replaced.
        seconds: per phase.
        directory: where the model, the picture and the reports lie.
    """

    seed: int
    scores: dict[str, EvaluationResult]
    report: ModelReport
    thrown_out: int
    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        stages = {
            stage: {
                "task_accuracy": score.task_accuracy,
                "caption_exact": score.caption_exact,
                "masr": score.masr,
                "asr": dict(score.safety.asr),
                "refusal_list": score.safety.refusal_list_id,
            }
            for stage, score in self.scores.items()
        }
        return {"seed": self.seed, "scores": stages, "thrown_out": self.thrown_out, "seconds": self.seconds}


def run_seed(
    seed: int,
    out: Path,
    settings: DemoSettings | None = None,
    config: HPAConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run the demo once and write its files under ``out/seed-<seed>``.

    Args:
        seed: at least 0; the settings were chosen on other seeds.
        out: a directory; made if missing.
        settings: task, tuning and sample counts; None for those of the demo.
        config: settings of HPA; None for the paper's.
        say: called with a line for each phase.
    """
    settings = DemoSettings() if settings is None else settings
    directory = out / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    phase = functools.partial(_phase, seconds, say)
    scores: dict[str, EvaluationResult] = {}

    old, processor = load_embedded()
    sets = draw_evaluation_sets(settings.task, seed, settings.task_count, settings.caption_count, settings.safety_count)
    with phase("evaluate the aligned model"):
        scores[STAGES[0]] = evaluate_embedded(old, processor, sets)
    with phase(f"fine-tune on {settings.task!r} with LoRA"):
        task_samples = draw_task(settings.task, settings.train_count, seed)
        new = add_lora(load_embedded()[0], settings.lora_rank, settings.lora_alpha, seed=seed)
        log = train(new, task_samples, functools.partial(collate_training, processor), settings.training(seed))
    with phase(f"evaluate after tuning ({log})"):
        scores[STAGES[1]] = evaluate_embedded(new, processor, sets)
    with phase("let the aligned model write the safety set"):
        safety_set = collect_safety_set(
            lambda samples: generate_answers(old, processor, samples),
            lambda risk: iter(draw_harmful("both", _SAFETY_CANDIDATES, seed, "train", risk_class=risk)),
            DEFAULT_REFUSALS.matches,
            RISK_CLASSES,
            size=settings.safety_calibration_count,
        )
    with phase("calibrate"):
        safety = calibrate(old, calibration_batches(processor, safety_set.samples))
        task_calibration = task_samples[: settings.task_calibration_count]
        task = calibrate(new, calibration_batches(processor, task_calibration, batch_size=32))
    with phase("harmonize"):
        report = harmonize_model(old, new, safety, task, config)
    with phase("save, reload and evaluate"):
        plain = new.merge_and_unload()
        plain.save_pretrained(directory / "model")
        processor.save_pretrained(directory / "model")
        del plain, new
        # As anybody would load it, with nothing of this library.
        reloaded = LlavaForConditionalGeneration.from_pretrained(directory / "model", dtype=torch.float32).eval()
        scores[STAGES[2]] = evaluate_embedded(reloaded, LlavaProcessor.from_pretrained(directory / "model"), sets)

    result = DemoResult(seed, scores, report, len(safety_set.thrown_out), directory, seconds)
    _write(result, safety_set)
    return result


@contextmanager
def _phase(seconds: dict[str, float], say: Callable[[str], None], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name.split(" (")[0]] = round(time.perf_counter() - started, 3)
    say(f"{name}: {seconds[name.split(' (')[0]]:.1f} s")


def _write(result: DemoResult, safety_set: SafetySet) -> None:
    directory = result.directory
    plot_retained_columns(
        result.report.layers,
        directory / "retained-columns.png",
        f"Columns that HPA retained from the model before tuning (seed {result.seed})",
    )
    safety = [
        {"instruction": sample.instruction, "answer": sample.answer, "risk_class": sample.risk_class}
        for sample in safety_set.samples
    ]
    for name, content in (
        ("safety-set.json", safety),
        ("report.json", result.report.to_dict()),
        ("result.json", result.to_dict()),
    ):
        (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary_rows(results: list[DemoResult]) -> list[list[str]]:
    """A row for each stage: task score, attack success rate and caption score, mean and range over the seeds."""
    metrics: tuple[Callable[[EvaluationResult], float], ...] = (
        lambda score: score.task_accuracy,
        lambda score: score.masr,
        lambda score: score.caption_exact,
    )
    rows = []
    for stage in STAGES:
        cells = [stage]
        for metric in metrics:
            values = torch.tensor([metric(result.scores[stage]) for result in results])
            cells.append(f"{values.mean():.1f}  [{values.min():.1f}, {values.max():.1f}]")
        rows.append(cells)
    return rows
