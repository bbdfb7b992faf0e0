"""What a sequence is tuned, calibrated and judged on, for one seed, condition and order; drawn once, encoded once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hpa_ext.data.safety_set import collect_safety_set
from hpa_ext.data.samples import Sample
from hpa_ext.data.toy_tasks import MODALITIES, RISK_CLASSES, draw_benign, draw_captions, draw_harmful, draw_task
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS

from .encoding import EncodedSample, encode
from .settings import CONDITIONS, ContinualSettings


@dataclass
class SequenceData:
    """The samples of one sequence, as embeddings of `model`, which is the aligned model and is not changed.

    ValueError for an unknown condition or order.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    seed: int
    condition: str
    order: int
    settings: ContinualSettings

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition: expected one of {', '.join(CONDITIONS)}, got {self.condition!r}")
        self.settings.order(self.order)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in their order."""
        return self.settings.order(self.order)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Those of them that a sequence learns."""
        return self.tasks[: self.settings.steps]

    @cached_property
    def tests(self) -> dict[str, list[EncodedSample]]:
        """Held-out samples of each task."""
        return {
            task: self._encode(draw_task(task, self.settings.test_count, self.seed, "test")) for task in self.learnt
        }

    @cached_property
    def safety_tests(self) -> dict[str, list[EncodedSample]]:
        """Held-out harmful prompts of each safety set."""
        return {
            name: self._encode(draw_harmful(name, self.settings.safety_count, self.seed, "test")) for name in MODALITIES
        }

    @cached_property
    def safety_calibration(self) -> list[EncodedSample]:
        """Harmful prompts with the refusals that the aligned model writes itself, spread over the risk classes."""
        found = collect_safety_set(
            lambda samples: generate_answers(self.model, self.processor, samples),
            lambda risk: iter(draw_harmful("both", 64, self.seed, "train", risk_class=risk)),
            DEFAULT_REFUSALS.matches,
            RISK_CLASSES,
            size=self.settings.safety_calibration_count,
        )
        return self._encode(found.samples)

    def step(self, number: int) -> StepData:
        """The data of the 0-based step."""
        settings, seed = self.settings, self.seed
        task, drawn = self.tasks[number], seed + 1000 * (number + 1)
        own = draw_task(task, settings.train_count, seed)
        general = int(settings.general_share * settings.train_count)
        mixed = draw_captions(general // 2, drawn) + draw_benign(general - general // 2, drawn)
        for other in self.tasks:
            if other != task:
                mixed += draw_task(other, int(settings.cross_share * settings.train_count), drawn)
        encoded = self._encode(own)
        harmful = self._injected(number, len(own) + len(mixed))
        base = encoded + (self._encode(mixed + harmful) if mixed or harmful else [])
        return StepData(encoded[: settings.task_calibration_count], base, harmful=len(harmful))

    def all_tasks(self) -> StepData:
        """The data of all steps at once, for multi-task tuning."""
        steps = [self.step(number) for number in range(len(self.learnt))]
        return StepData(
            [sample for step in steps for sample in step.calibration],
            [sample for step in steps for sample in step.samples],
            sum(step.harmful for step in steps),
        )

    def _injected(self, number: int, count: int) -> list[Sample]:
        """The harmful samples among ``count`` others: the rate is one of samples, as in the source.

        A share of about one sample is rounded up or down at random, so that its mean is right; kind of harm and risk
        class go through all in the course of a sequence.
        """
        if self.condition == "original":
            return []
        rng = random.Random(f"injected-{self.seed}-{number}")
        harmful = math.floor(self.settings.injection_rate * count + rng.random())
        kinds = [MODALITIES[(number + place) % len(MODALITIES)] for place in range(harmful)]
        return [
            draw_harmful(kind, 1, rng.randrange(10**6), "train", "compliance", risk_class=rng.choice(RISK_CLASSES))[0]
            for kind in kinds
        ]

    def _encode(self, samples: list[Sample]) -> list[EncodedSample]:
        return encode(self.model, self.processor, samples)


@dataclass(frozen=True)
class StepData:
    """``samples``: what is tuned on; ``calibration``: samples of the task alone, for its Gram; ``harmful``: how many
    harmful ones are among the samples.
    """

    calibration: list[EncodedSample]
    samples: list[EncodedSample]
    harmful: int
