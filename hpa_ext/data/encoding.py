"""Conversations as model inputs through a processor's own chat template, with labels on every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpa_ext.data.conversations import Conversation, Picture
from hpa_ext.token_masks import IGNORED_LABEL

# What a processor returns for each token, besides the ids.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, labels (-100 outside of answers) if they were asked for, and what images became."""

    ids: list[int]
    labels: list[int] | None
    images: dict[str, Any] = field(default_factory=dict)


class ConversationEncoder:
    """Turns conversations into model inputs.

    Args:
        processor: a processor with a chat template, or for text alone a tokenizer with one.

    Raises:
        ValueError: it has no chat template, or its tokenizer is not a fast one.

    The whole conversation is rendered by the template and tokenised at once, as in inference. If it does not end in a
    special token, the tokenizer's end token is added, which training puts after an answer.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._takes_images = self.tokenizer is not processor
        if not (getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError(
                f"processor: {type(processor).__name__} has no chat template, so the prompt format of the model is not "
                "known; put a chat_template.jinja next to its files, or set processor.chat_template"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"processor: expected a fast tokenizer, got {type(self.tokenizer).__name__}")

    def encode(self, conversation: Conversation, labels: bool = False, answered: bool = True) -> Encoded:
        """Token ids of a conversation; with `answered` False up to where the next answer begins.

        Raises:
            ValueError: the processor takes no images, or its template writes turns in a way that leaves the borders of
                answers unknown (with `labels`); the message begins with the record.
        """
        pictures = conversation.pictures
        if pictures and not self._takes_images:
            raise ValueError(f"{conversation.where}: has images, which {type(self.processor).__name__} does not take")
        messages = self._messages(conversation)
        text = self._render(messages, prompt=not answered)
        # A template that writes the begin token itself must not get a second one.
        begin = self.tokenizer.bos_token
        add_special = not (begin and text.startswith(begin))
        plain = self.tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True)
        plain_ids, offsets = list(plain["input_ids"]), list(plain["offset_mapping"])
        marks = self._answer_marks(conversation, messages, text, offsets) if labels else [False] * len(plain_ids)
        images: dict[str, Any] = {}
        ids = plain_ids
        if pictures:
            opened = [picture.open() for picture in pictures]
            found = dict(self.processor(text=[text], images=opened, add_special_tokens=add_special))
            ids = [int(token) for token in found.pop("input_ids")[0]]
            marks = _spread(plain_ids, marks, ids, conversation.where)
            found.pop("attention_mask", None)
            images = {key: value for key, value in found.items() if key not in _PER_TOKEN}
        if answered and ids[-1] not in self.tokenizer.all_special_ids and self.tokenizer.eos_token_id is not None:
            ids, marks = [*ids, self.tokenizer.eos_token_id], [*marks, True]
        marked = [token if mark else IGNORED_LABEL for token, mark in zip(ids, marks, strict=True)]
        return Encoded(ids, marked if labels else None, images)

    def batch(
        self, conversations: Sequence[Conversation], labels: bool = False, answered: bool = True, side: str = "right"
    ) -> dict[str, Tensor]:
        """Padded inputs: ``input_ids``, ``attention_mask`` (and ``labels``) int64 ``[batch, tokens]``, and images.

        Args:
            conversations: at least one.
            labels, answered: see `encode`.
            side: where the padding goes; generation needs "left". Without a pad token the end token fills it.
        """
        rows = [self.encode(conversation, labels, answered) for conversation in conversations]
        width = max(len(row.ids) for row in rows)
        padding = self.tokenizer.pad_token_id
        if padding is None and any(len(row.ids) < width for row in rows):
            padding = self.tokenizer.eos_token_id
            if padding is None:
                raise ValueError("processor: its tokenizer has no pad token; use batch_size=1 or set one")

        def padded(values: list[list[int]], fill: int) -> Tensor:
            blanks = [[fill] * (width - len(row)) for row in values]
            joined = [b + row if side == "left" else row + b for b, row in zip(blanks, values, strict=True)]
            return torch.tensor(joined, dtype=torch.int64)

        batch = {
            "input_ids": padded([row.ids for row in rows], padding or 0),
            "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        }
        if labels:
            batch["labels"] = padded([row.labels or [] for row in rows], IGNORED_LABEL)
        with_images = [row.images for row in rows if row.images]
        for key in with_images[0] if with_images else ():
            batch[key] = _joined([images[key] for images in with_images], key)
        return batch

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        if not self._takes_images:
            return [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
        messages = []
        for turn in conversation.turns:
            content = [
                {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
                for part in turn.parts
            ]
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _answer_marks(
        self, conversation: Conversation, messages: list[dict[str, Any]], text: str, offsets: list[tuple[int, int]]
    ) -> list[bool]:
        """For each token whether it is of an answer: what the template writes after the prompt for that answer."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:index], prompt=True), self._render(messages[: index + 1], False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"{conversation.where}: the chat template writes turn {index + 1} differently in the whole "
                    "conversation, so its answers cannot be told apart; use token_mask='attended'"
                )
            answer = text[len(before) : len(after)]
            start = len(before) + len(answer) - len(answer.lstrip())
            spans.append((start, start + len(answer.strip())))
        return [any(start < b and a < stop for start, stop in spans) and b > a for a, b in offsets]


def _spread(plain: list[int], marks: list[bool], expanded: list[int], where: str) -> list[bool]:
    """Carry marks over from the tokens of a text to those in which image placeholders have become several.

    Everything that is not put in for an image is in `expanded` too, in order, so each token's first match will do.
    """
    result: list[bool] = []
    waiting = iter(zip(plain, marks, strict=True))
    token, mark = next(waiting, (None, False))
    for came in expanded:
        if came == token:
            result.append(mark)
            token, mark = next(waiting, (None, False))
        else:
            result.append(False)
    if token is not None:
        raise ValueError(f"{where}: the processor changes the text around images, so answers cannot be told apart")
    return result


def _joined(values: list[Any], key: str) -> Tensor:
    """The images of several conversations along the first dimension."""
    tensors = []
    for value in values:
        if isinstance(value, (list, tuple)):
            value = torch.stack([torch.as_tensor(item) for item in value])
        tensors.append(torch.as_tensor(value))
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise ValueError(f"batch_size: images of different sizes give different {key}; use batch_size=1")
    return torch.cat(tensors)
