"""Calibration data as batches by number, with what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpa_ext.calibrating.run import Batches
from hpa_ext.data.conversations import Conversation, from_sample
from hpa_ext.data.encoding import ConversationEncoder
from hpa_ext.data.records import ConversationSet
from hpa_ext.data.samples import Sample


class ConversationBatches:
    """Conversations, encoded a batch at a time; images are opened with their batch.

    Args:
        conversations: what to encode, in order.
        encoder: for the model.
        size: conversations a batch; the last one may be smaller.
        labels: whether batches need labels.
        most_tokens: the longest input that the model takes, None if it has no limit.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        encoder: ConversationEncoder,
        size: int,
        labels: bool,
        most_tokens: int | None,
    ) -> None:
        self._conversations = conversations
        self._encoder = encoder
        self._size = size
        self._labels = labels
        self._most_tokens = most_tokens

    def __len__(self) -> int:
        return -(-len(self._conversations) // self._size)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        chosen = [self._conversations[i] for i in self._range(number)]
        batch = self._encoder.batch(chosen, self._labels)
        lengths = batch["attention_mask"].sum(1).tolist()
        for conversation, length in zip(chosen, lengths, strict=True):
            if self._most_tokens is not None and length > self._most_tokens:
                raise ValueError(
                    f"{conversation.where}: expected at most {self._most_tokens} tokens for this model, got {length}"
                )
        return batch

    def _range(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, len(self._conversations)))


def calibration_batches(
    samples: Any,
    encoder: ConversationEncoder | None,
    size: int,
    labels: bool,
    most_tokens: int | None,
) -> tuple[Batches, dict[str, Any]]:
    """Batches from what the caller has, and plain values that identify the data.

    Args:
        samples: a `ConversationSet`, a sequence of `Conversation` or `Sample`, or a sequence of ready batches.
        encoder: for all but ready batches.
        size, labels, most_tokens: see `ConversationBatches`.
    """
    if not isinstance(samples, (ConversationSet, Sequence)) or isinstance(samples, str) or len(samples) == 0:
        came = "none" if isinstance(samples, Sequence) and len(samples) == 0 else type(samples).__name__
        raise ValueError(f"samples: expected a sequence of at least one conversation, sample or batch, got {came}")
    if isinstance(samples[0], Mapping):
        return samples, {"batches": len(samples), "digest": _digest_of_batches(samples)}
    found = [from_sample(item, i) if isinstance(item, Sample) else item for i, item in enumerate(samples)]
    wrong = next((item for item in found if not isinstance(item, Conversation)), None)
    if wrong is not None:
        raise TypeError(f"samples: expected conversations, samples or batches, got {type(wrong).__name__}")
    if encoder is None:
        raise ValueError("processor: expected one for samples that are not batches yet")
    data = dict(samples.provenance) if isinstance(samples, ConversationSet) else {"ids": [item.id for item in found]}
    total = hashlib.sha256()
    for conversation in found:
        total.update(conversation.digest().encode())
    data["digest"] = total.hexdigest()
    return ConversationBatches(found, encoder, size, labels, most_tokens), data


def _digest_of_batches(batches: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(f"samples[{number}]: expected a batch like the first one, got {type(batch).__name__}")
        for key in sorted(batch):
            value = batch[key]
            digest.update(f"{number} {key} ".encode())
            if isinstance(value, Tensor):
                plain = value.detach().cpu().contiguous()
                digest.update(f"{plain.dtype} {list(plain.shape)} ".encode())
                digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
