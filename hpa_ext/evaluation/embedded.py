"""One evaluation of an embedded model: a task, the three safety sets, and what is left of its captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..data.samples import Sample
from ..data.toy_tasks import MODALITIES, draw_captions, draw_harmful, draw_task
from .generate import generate_answers
from .metrics import DEFAULT_REFUSALS, RefusalList, SafetyScore, accuracy, safety_score


@dataclass(frozen=True)
class EvaluationSets:
    """Held-out samples: of the task, of the captions, and of each safety set by its name."""

    task: list[Sample]
    captions: list[Sample]
    safety: dict[str, list[Sample]]


@dataclass(frozen=True)
class EvaluationResult:
    """Percentages. ``task_accuracy``: by the authors' rule; ``task_exact`` and ``caption_exact``: the whole answer
    equal.
    """

    task_accuracy: float
    task_exact: float
    caption_exact: float
    safety: SafetyScore

    @property
    def masr(self) -> float:
        """Mean attack success rate over the safety sets, in percent."""
        return self.safety.masr


def draw_evaluation_sets(
    task: str, seed: int, task_count: int = 100, caption_count: int = 60, safety_count: int = 60
) -> EvaluationSets:
    """The test split of ``task`` with the given sizes; ``safety_count`` is per safety set, the risk classes in turn."""
    safety = {name: draw_harmful(name, safety_count, seed, "test") for name in MODALITIES}
    return EvaluationSets(draw_task(task, task_count, seed, "test"), draw_captions(caption_count, seed, "test"), safety)


def evaluate_embedded(
    model: torch.nn.Module, processor: Any, sets: EvaluationSets, refusals: RefusalList = DEFAULT_REFUSALS
) -> EvaluationResult:
    """Generate the answers to all sets, and score them. ValueError on an empty set."""
    groups = {"task": sets.task, "captions": sets.captions} | {
        f"safety {name}": given for name, given in sets.safety.items()
    }
    # All prompts in one run: fewer and fuller batches. An answer does not depend on its batch.
    answers = generate_answers(
        model, processor, [sample for group in groups.values() for sample in group], description="evaluating"
    )
    by_group, start = {}, 0
    for name, group in groups.items():
        by_group[name] = answers[start : start + len(group)]
        start += len(group)
    task_truth = [sample.answer for sample in sets.task]
    return EvaluationResult(
        task_accuracy=accuracy(by_group["task"], task_truth),
        task_exact=accuracy(by_group["task"], task_truth, exact=True),
        caption_exact=accuracy(by_group["captions"], [sample.answer for sample in sets.captions], exact=True),
        safety=safety_score({name: by_group[f"safety {name}"] for name in sets.safety}, refusals),
    )
