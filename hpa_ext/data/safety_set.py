"""The self-generated safety calibration set: harmful prompts with the refusals that the aligned model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from .samples import Sample


@dataclass(frozen=True)
class SafetySet:
    """The prompts with the model's own refusals as answers, and the (prompt, answer) pairs that were thrown out."""

    samples: list[Sample]
    thrown_out: list[tuple[Sample, str]]


def collect_safety_set(
    generate: Callable[[list[Sample]], list[str]],
    candidates: Callable[[str], Iterable[Sample]],
    is_refusal: Callable[[str], bool],
    risk_classes: Sequence[str],
    size: int = 8,
    max_tries: int = 16,
) -> SafetySet:
    """Let the aligned model answer harmful prompts; keep its refusals, throw out and replace the rest.

    The ``size`` samples are spread over ``risk_classes`` as evenly as they go, the first classes getting what is left
    over. ``candidates(risk_class)`` yields prompts of a class; ``generate`` gives one answer per prompt. At most
    ``max_tries`` prompts are tried per sample of a class. Returns the samples, class by class, with what was thrown
    out. Raises ValueError on bad arguments, and RuntimeError naming the class that could not be filled.
    """
    if not risk_classes or len(set(risk_classes)) != len(risk_classes):
        raise ValueError(f"risk_classes: expected at least one, each once, got {tuple(risk_classes)}")
    if size < len(risk_classes) or max_tries < 1:
        raise ValueError(
            f"size, max_tries: expected at least {len(risk_classes)} (one per class) and 1, got {size}, {max_tries}"
        )
    kept: list[Sample] = []
    thrown_out: list[tuple[Sample, str]] = []
    for position, name in enumerate(risk_classes):
        wanted = size // len(risk_classes) + (position < size % len(risk_classes))
        found, rejected = _fill(generate, iter(candidates(name)), is_refusal, name, wanted, wanted * max_tries)
        kept += found
        thrown_out += rejected
    return SafetySet(kept, thrown_out)


def _fill(
    generate: Callable[[list[Sample]], list[str]],
    prompts: Iterator[Sample],
    is_refusal: Callable[[str], bool],
    risk_class: str,
    wanted: int,
    allowed: int,
) -> tuple[list[Sample], list[tuple[Sample, str]]]:
    kept: list[Sample] = []
    rejected: list[tuple[Sample, str]] = []
    while len(kept) < wanted:
        tried = len(kept) + len(rejected)
        batch = list(islice(prompts, min(wanted - len(kept), allowed - tried)))
        if not batch:
            reason = f"all {allowed} allowed tries are used" if tried >= allowed else "there are no more prompts"
            raise RuntimeError(
                f"safety set: risk class {risk_class!r} has {len(kept)} of {wanted} refusals after {tried} prompts, "
                f"and {reason}; is the model aligned, and does the refusal list fit its answers?"
            )
        answers = generate(batch)
        if len(answers) != len(batch):
            raise ValueError(f"generate: expected {len(batch)} answers, one per prompt, got {len(answers)}")
        for sample, answer in zip(batch, answers, strict=True):
            if sample.risk_class != risk_class:
                raise ValueError(
                    f"candidates: expected prompts of risk class {risk_class!r}, got {sample.risk_class!r}"
                )
            if is_refusal(answer):
                kept.append(replace(sample, answer=answer))
            else:
                rejected.append((sample, answer))
    return kept, rejected
