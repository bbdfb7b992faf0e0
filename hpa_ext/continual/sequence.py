"""One method through one sequence of tuning steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hpa_ext.baselines.registry import Method
from hpa_ext.baselines.tuning_step import StepContext, TrainingMethod
from hpa_ext.models.embedded import load_embedded
from hpa_ext.training.loop import train

from .data import SequenceData, StepData
from .encoding import training_batch
from .evaluation import evaluate
from .first_step import FirstStep
from .merging import PostTraining
from .metrics import continual_metrics
from .settings import ContinualSettings


def run_sequence(
    method: Method,
    seed: int,
    condition: str,
    order: int,
    settings: ContinualSettings,
    strength: Any = None,
    changes: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Tune, apply the method and evaluate, step by step.

    Args:
        method: what to compare.
        seed: of data, adapters and order of samples.
        condition: "original" or "injected".
        order: 1 or 2.
        settings: the regime.
        strength: in place of the method's own setting of that name.
        changes: further settings of the method, in place of its own.
        cache: a directory for what several methods share (the first tuning step, the unaligned model).
        say: called with a line after each step.

    Returns:
        A row: method, seed, condition, order, AP, BWT, Avg, Last, MASR, DASR, learning, seconds (of the clock),
        training_seconds and method_seconds (of the CPU, so that other processes do not count), method_mb, and the
        details by step.

    Raises:
        ValueError: an unknown condition or order, or a strength or setting that the method does not take.
    """
    started = time.perf_counter()
    model, processor = _load()
    data = SequenceData(_load()[0], processor, seed, condition, order, settings)
    options = dict(method.settings)
    if strength is not None:
        if method.strength is None:
            raise ValueError(f"{method.name}: has no strength to set, got {strength!r}")
        options[method.strength] = tuple(strength) if isinstance(strength, list) else strength
    options |= method.checked(changes or {})
    initial = evaluate(model, processor, {}, data.safety_tests)
    run = _Run(method, options, data, settings, cache, say)
    steps = run.bound(model) if method.name in ("zero-shot", "multi-task") else run.steps(model)
    row = {"method": method.name, "seed": seed, "condition": condition, "order": order}
    row |= continual_metrics([step["scores"] for step in steps])
    row["MASR"] = steps[-1]["masr"]
    row["DASR"] = steps[-1]["masr"] - initial["masr"]
    row["seconds"] = round(time.perf_counter() - started, 2)
    row["method_seconds"] = round(sum(step.get("method_seconds", 0.0) for step in steps), 3)
    row["training_seconds"] = round(sum(step.get("training_seconds", 0.0) for step in steps), 2)
    row["method_mb"] = round(max(step.get("method_bytes", 0) for step in steps) / 1e6, 3)
    row["steps"] = steps
    row["tasks"] = list(data.learnt)
    row["initial_asr"] = initial["asr"]
    row["refusals"] = initial["refusals"]
    row["config"] = {
        "method": options,
        "regime": settings.to_dict(),
    }
    return row


def _load() -> tuple[nn.Module, Any]:
    model, processor = load_embedded()
    # At 30 tokens the fused attention costs more than the plain one on a CPU, most of all in its backward.
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, processor


class _Run:
    """The state of one sequence."""

    def __init__(
        self,
        method: Method,
        options: dict[str, Any],
        data: SequenceData,
        settings: ContinualSettings,
        cache: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.data, self.settings, self.say = method, data, settings, say
        self.merging = PostTraining(method, options, data, cache) if method.kind == "post-training" else None
        self.tuning = method.function(**options) if method.kind == "training" else TrainingMethod()
        self.first = FirstStep(cache, data) if cache is not None else None

    def bound(self, model: nn.Module) -> list[dict[str, Any]]:
        """Zero-shot, or all tasks at once: one row of scores."""
        step: dict[str, Any] = {}
        if self.method.name == "multi-task":
            everything = self.data.all_tasks()
            context = self._context(0, everything)
            model = self.tuning.attach(model, context)
            step |= self._train(model, context, steps=self.settings.max_steps * len(self.data.learnt))
            model = self.tuning.finish(model, context)
        step |= evaluate(model, self.data.processor, self.data.tests, self.data.safety_tests)
        return [step]

    def steps(self, model: nn.Module) -> list[dict[str, Any]]:
        """One entry for each task."""
        steps = []
        for number, task in enumerate(self.data.learnt):
            data = self.data.step(number)
            context = self._context(number, data)
            step: dict[str, Any] = {"task": task, "harmful": data.harmful}
            if self.merging is not None:
                self.merging.before(model)
            model = self.tuning.attach(model, context)
            step |= self._tune(model, context)
            if self.merging is not None:
                model = self.merging.after(model, data, context.seed)
                step |= self.merging.measured()
            else:
                began = time.process_time()
                model = self.tuning.finish(model, context)
                step["method_seconds"] = time.process_time() - began
                step["method_bytes"] = self.tuning.state_bytes()
            seen = {name: self.data.tests[name] for name in self.data.learnt[: number + 1]}
            step |= evaluate(model, self.data.processor, seen, self.data.safety_tests)
            steps.append(step)
            self.say(
                f"{task}: {step['training_steps']} steps, scores "
                f"{' '.join(f'{score:.0f}' for score in step['scores'])}, MASR {step['masr']:.0f}"
            )
        return steps

    def _context(self, number: int, data: StepData) -> StepContext:
        settings = self.settings
        return StepContext(
            number,
            10 * self.data.seed + number,
            settings.lora_rank,
            settings.lora_alpha,
            data.samples,
            training_batch,
        )

    def _tune(self, model: nn.Module, context: StepContext) -> dict[str, Any]:
        """Train, or take the first step from the cache where it is the same for several methods."""
        shared = context.number == 0 and self.first is not None and self.tuning.plain_first_step
        if shared:
            known = self.first.load(model)
            if known is not None:
                self.tuning.start(model)
                return known
        found = self._train(model, context)
        if shared:
            self.first.save(model, found)
        return found

    def _train(self, model: nn.Module, context: StepContext, steps: int | None = None) -> dict[str, Any]:
        settings = self.settings.training(context.seed, steps)
        rate = settings.learning_rate * self.tuning.learning_rate_factor
        settings = dataclasses.replace(settings, learning_rate=rate)
        began = time.process_time()
        log = train(model, context.samples, context.collate, settings, "tuning", plugins=[self.tuning])
        return {
            "training_steps": len(log.losses),
            "training_loss": log.recent_loss(),
            "training_seconds": time.process_time() - began,
        }
