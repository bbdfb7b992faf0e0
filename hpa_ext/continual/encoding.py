"""Samples encoded once for a whole sequence: token ids, and image features, which no step of the sequence changes.

The vision tower, the projector and the embeddings are frozen throughout, so their outputs are computed once. Batches
carry `inputs_embeds`, which every LLaVA of transformers takes in place of pixels and ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpa_ext.data.collate import collate_training
from hpa_ext.data.samples import Sample
from hpa_ext.token_masks import IGNORED_LABEL


@dataclass(frozen=True)
class EncodedSample:
    """A sample with its prompt and answer as embeddings.

    Attributes:
        sample: what it was made of.
        embeddings: ``[tokens, width]`` of prompt, answer and end token; image features in place.
        labels: ``[tokens]`` int64, -100 on the prompt.
    """

    sample: Sample
    embeddings: Tensor
    labels: Tensor

    @property
    def prompt_tokens(self) -> int:
        """How many tokens precede the answer."""
        return int((self.labels == IGNORED_LABEL).sum())


@torch.no_grad()
def encode(
    model: torch.nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int = 64
) -> list[EncodedSample]:
    """The samples as the model's language part receives them. ValueError on no samples or an empty answer."""
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    image_token = model.config.image_token_index
    table = model.get_input_embeddings()
    encoded = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        batch = collate_training(processor, chunk)
        embeddings = table(batch["input_ids"])
        if "pixel_values" in batch:
            pixels = batch["pixel_values"].to(embeddings.dtype)
            features = model.model.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", features)
            features = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
            embeddings[batch["input_ids"] == image_token] = features.reshape(-1, embeddings.shape[-1])
        for sample, rows, mask, labels in zip(chunk, embeddings, batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            encoded.append(EncodedSample(sample, rows[:length].clone(), labels[:length].clone()))
    return encoded


def training_batch(encoded: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """``inputs_embeds`` ``[batch, tokens, width]``, ``attention_mask`` and ``labels`` ``[batch, tokens]``, padded on
    the right.
    """
    embeddings = torch.nn.utils.rnn.pad_sequence([item.embeddings for item in encoded], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [item.labels for item in encoded], batch_first=True, padding_value=IGNORED_LABEL
    )
    lengths = torch.tensor([len(item.labels) for item in encoded])
    mask = (torch.arange(labels.shape[1]) < lengths[:, None]).long()
    return {"inputs_embeds": embeddings, "attention_mask": mask, "labels": labels}


def prompt_batch(encoded: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """Prompts alone, padded on the left: ``inputs_embeds`` ``[batch, tokens, width]``, ``attention_mask``."""
    prompts = [item.embeddings[: item.prompt_tokens] for item in encoded]
    embeddings = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    width = embeddings.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return {"inputs_embeds": embeddings, "attention_mask": mask}
