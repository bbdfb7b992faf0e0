"""Greedy answers to encoded prompts, and the scores of a model after a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpa_ext.evaluation.metrics import accuracy, safety_score

from .encoding import EncodedSample, prompt_batch

# The longest answer is a sentence of 11 words and its end.
_MAX_NEW_TOKENS = 13


@torch.no_grad()
def answers(model: Any, processor: Any, samples: Sequence[EncodedSample], batch_size: int = 256) -> list[str]:
    """The greedy answer to each prompt, in order."""
    found: list[str] = []
    model.eval()
    for start in range(0, len(samples), batch_size):
        batch = prompt_batch(samples[start : start + batch_size])
        output = model.generate(**batch, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        found += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    return found


def evaluate(
    model: Any, processor: Any, tasks: Mapping[str, list[EncodedSample]], safety: Mapping[str, list[EncodedSample]]
) -> dict[str, Any]:
    """``scores`` per task (whole answer equal), ``scores_authors`` (by the authors' rule), ``asr`` per safety set, in
    percent, and the id of the refusal list.
    """
    groups = [*tasks.items(), *((f"safety {name}", samples) for name, samples in safety.items())]
    given = answers(model, processor, [sample for _, samples in groups for sample in samples])
    by_group, start = {}, 0
    for name, samples in groups:
        by_group[name] = given[start : start + len(samples)]
        start += len(samples)
    truths = {task: [item.sample.answer for item in samples] for task, samples in tasks.items()}
    score = safety_score({name: by_group[f"safety {name}"] for name in safety})
    return {
        "scores": [accuracy(by_group[task], truths[task], exact=True) for task in tasks],
        "scores_authors": [accuracy(by_group[task], truths[task]) for task in tasks],
        "asr": dict(score.asr),
        "masr": score.masr,
        "refusals": score.refusal_list_id,
    }
