"""Samples to model inputs, for any LLaVA processor with a chat template.

The prompt and the answer are tokenised apart and joined as ids, so the border between them is exact whatever the
tokenizer would have merged across it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..token_masks import IGNORED_LABEL
from .samples import Sample


def prompt_text(processor: Any, sample: Sample) -> str:
    """The sample's instruction in the processor's chat template, up to where the answer begins."""
    content: list[dict[str, str]] = [{"type": "image"}] if sample.image is not None else []
    content.append({"type": "text", "text": sample.instruction})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def collate_training(processor: Any, samples: Sequence[Sample], padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Prompts with answers, for a loss or for calibration.

    Returns ``input_ids``, ``attention_mask``, ``labels``, all int64 ``[batch, tokens]``, and ``pixel_values``
    ``[images, 3, height, width]`` if any sample has an image. ``labels`` holds the answer and the end token that
    closes it; prompt and padding are -100. Raises ValueError on an empty batch, an empty answer or an unknown padding
    side.
    """
    prompts, pixels = _encode_prompts(processor, samples)
    end = processor.tokenizer.eos_token_id
    rows, labels = [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        if not sample.answer.strip():
            raise ValueError(f"answer: a training sample needs one, got {sample.answer!r} to {sample.instruction!r}")
        answer = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"] + [end]
        rows.append(prompt + answer)
        labels.append([IGNORED_LABEL] * len(prompt) + answer)
    batch = _pad_batch(processor, rows, padding_side)
    batch["labels"] = _pad(labels, IGNORED_LABEL, padding_side)
    return batch | pixels


def collate_prompts(processor: Any, samples: Sequence[Sample], padding_side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts without answers: as ``collate_training`` without ``labels``. Generation needs the left padding."""
    rows, pixels = _encode_prompts(processor, samples)
    return _pad_batch(processor, rows, padding_side) | pixels


def calibration_batches(
    processor: Any, samples: Sequence[Sample], batch_size: int = 8, padding_side: str = "right"
) -> list[dict[str, torch.Tensor]]:
    """The samples in order, as training batches of ``batch_size``; the last one may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    starts = range(0, len(samples), batch_size)
    return [collate_training(processor, samples[start : start + batch_size], padding_side) for start in starts]


def _encode_prompts(processor: Any, samples: Sequence[Sample]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    texts = [prompt_text(processor, sample) for sample in samples]
    images = [sample.image for sample in samples if sample.image is not None]
    # The template may already write the begin token that the tokenizer would add.
    begin = processor.tokenizer.bos_token
    add_begin = not (begin and texts[0].startswith(begin))
    encoded = processor(text=texts, images=images or None, add_special_tokens=add_begin)
    if not images:
        return encoded["input_ids"], {}
    # The processor leaves unpadded ids as lists, so the pixels come as a list of arrays too.
    pixels = torch.stack([torch.as_tensor(value) for value in encoded["pixel_values"]])
    return encoded["input_ids"], {"pixel_values": pixels}


def _pad_batch(processor: Any, rows: list[list[int]], padding_side: str) -> dict[str, torch.Tensor]:
    pad = processor.tokenizer.pad_token_id
    if pad is None:
        raise ValueError("processor: its tokenizer has no pad token; set tokenizer.pad_token first")
    mask = [[1] * len(row) for row in rows]
    return {"input_ids": _pad(rows, pad, padding_side), "attention_mask": _pad(mask, 0, padding_side)}


def _pad(rows: list[list[int]], value: int, padding_side: str) -> torch.Tensor:
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    width = max(len(row) for row in rows)
    filled = []
    for row in rows:
        padding = [value] * (width - len(row))
        filled.append(padding + row if padding_side == "left" else row + padding)
    return torch.tensor(filled, dtype=torch.int64)
