"""Greedy answers in batches, with left padding, so that a sample's answer does not depend on its neighbours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..data.collate import collate_prompts
from ..data.samples import Sample


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    max_new_tokens: int = 16,
    batch_size: int = 64,
    description: str = "answers",
) -> list[str]:
    """The model's greedy answer to each sample's prompt, in order, without special tokens and outer blanks.

    Runs on the model's device and puts the model back into the mode it was in. ValueError on no samples.
    """
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens, batch_size: expected at least 1 each, got {max_new_tokens}, {batch_size}")
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    answers: list[str] = []
    try:
        starts = range(0, len(samples), batch_size)
        for start in tqdm(starts, desc=description, disable=not sys.stderr.isatty()):
            inputs = collate_prompts(processor, samples[start : start + batch_size], padding_side="left")
            inputs = {name: value.to(parameter.device) for name, value in inputs.items()}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(parameter.dtype)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    finally:
        model.train(was_training)
    return answers
