"""What images and prompts are routed by: features of CLIP's towers, or of the model's own parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

IMAGE_FEATURES = ("pooled", "projected", "mean")
PROMPT_PARTS = ("instruction", "prompt")


class TextFeature(Protocol):
    """Prompts to features; `describe` says which, in plain values."""

    def __call__(self, input_ids: Tensor, counted: Tensor) -> Tensor:
        """Ids ``[b, tokens]`` and bool ``[b, tokens]`` (prompt, no padding, no image) to ``[b, d]``."""

    def describe(self) -> dict[str, Any]:
        """What is computed, as plain values: anchors of another description are refused."""


class ImageFeature:
    """A feature of each image from the output of the model's own vision tower.

    Args:
        kind: "pooled" (CLIP's normalised class token), "projected" (that, by CLIP's visual projection into the space
            that it shares with text: the authors' choice), or "mean" (over the last layer's tokens).
        projection: ``[d, width]``, ``visual_projection.weight`` of the CLIP that the tower comes from; LLaVA does not
            keep it. For "projected" alone.

    Raises:
        ValueError: an unknown kind, or a projection with or without need.
    """

    def __init__(self, kind: str = "pooled", projection: Tensor | None = None) -> None:
        if kind not in IMAGE_FEATURES:
            raise ValueError(f"kind: expected one of {', '.join(IMAGE_FEATURES)}, got {kind!r}")
        if (projection is None) == (kind == "projected"):
            raise ValueError(f"projection: expected CLIP's visual projection for 'projected' alone, with kind {kind!r}")
        self.kind = kind
        self.projection = None if projection is None else projection.detach()

    def __call__(self, tower_output: Any) -> Tensor:
        """``[images, d]`` float32 of what the vision tower returned."""
        if self.kind == "mean":
            return tower_output.last_hidden_state.detach().float().mean(1)
        pooled = getattr(tower_output, "pooler_output", None)
        if not isinstance(pooled, Tensor):
            raise ValueError(f"image features: {self.kind!r} expected a vision tower with a pooled output, got none")
        pooled = pooled.detach().float()
        return pooled if self.projection is None else pooled @ self.projection.to(pooled.device).float().mT

    def describe(self) -> dict[str, Any]:
        """What is computed."""
        return {"image": self.kind}


class EmbeddingText:
    """The mean embedding of the prompt's tokens, by the language model's own table: where there is no CLIP text tower.

    Args:
        embedding: the table; it must be the one with which the anchors were made.
        skip_ids: tokens that do not count, such as those that every prompt has.
    """

    def __init__(self, embedding: nn.Embedding, skip_ids: Sequence[int] = ()) -> None:
        self.embedding = embedding
        self.skip_ids = sorted({int(value) for value in skip_ids})

    def __call__(self, input_ids: Tensor, counted: Tensor) -> Tensor:
        """``[b, width]`` float32; zero for a prompt without a token that counts."""
        if self.skip_ids:
            counted = counted & ~torch.isin(input_ids, torch.tensor(self.skip_ids, device=input_ids.device))
        safe = input_ids.clamp(0, self.embedding.num_embeddings - 1)  # an image's placeholder may lie outside
        table = nn.functional.embedding(safe, self.embedding.weight.detach()).float()
        weights = counted.float()
        return torch.einsum("bt,btd->bd", weights, table) / weights.sum(1, keepdim=True).clamp(min=1)

    def describe(self) -> dict[str, Any]:
        """What is computed."""
        return {"text": "embedding", "skip_ids": self.skip_ids}


class ClipText:
    """The feature of the prompt's text by CLIP's text tower.

    Args:
        text_model: transformers' ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.
        clip_tokenizer: its tokenizer.
        tokenizer: the language model's, by which the prompt's ids become text again.
        projected: False (the authors' choice) for the pooled output before CLIP's text projection, True for after it
            (``CLIPTextModelWithProjection``). Only the latter is the space in which CLIP compares texts with images,
            which HiDe does not do.
        part: "instruction" (the authors' choice): what follows the first newline, up to " ASSISTANT"; "prompt": all.
        max_tokens: CLIP's tokens that count, 77 in the authors' code; longer text is cut.
        begin, end: what "instruction" lies between. In a prompt without `begin` it starts after the first of
            `begin_without` that is there, and at the start if none is.
    """

    def __init__(
        self,
        text_model: nn.Module,
        clip_tokenizer: Any,
        tokenizer: Any,
        *,
        projected: bool = False,
        part: str = "instruction",
        max_tokens: int = 77,
        begin: str = "\n",
        end: str = " ASSISTANT",
        begin_without: Sequence[str] = ("USER:",),
    ) -> None:
        if part not in PROMPT_PARTS:
            raise ValueError(f"part: expected one of {', '.join(PROMPT_PARTS)}, got {part!r}")
        if projected and not hasattr(text_model, "text_projection"):
            raise ValueError(
                f"projected: expected a CLIPTextModelWithProjection as text_model, got {type(text_model).__name__}"
            )
        self.text_model = text_model.eval().requires_grad_(False)
        self.clip_tokenizer, self.tokenizer = clip_tokenizer, tokenizer
        self.projected, self.part, self.max_tokens = projected, part, max_tokens
        self.begin, self.end, self.begin_without = begin, end, tuple(begin_without)

    def texts(self, input_ids: Tensor, counted: Tensor) -> list[str]:
        """The text of each prompt that is encoded."""
        rows = [ids[keep].tolist() for ids, keep in zip(input_ids.cpu(), counted.cpu(), strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return texts if self.part == "prompt" else [self.instruction(text) for text in texts]

    def instruction(self, text: str) -> str:
        """What lies between `begin` and `end`."""
        if self.begin in text:
            text = text.split(self.begin, 1)[1]
        else:
            start = next((mark for mark in self.begin_without if mark in text), None)
            text = text if start is None else text.split(start, 1)[1]
        return text.split(self.end, 1)[0].strip()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, counted: Tensor) -> Tensor:
        """``[b, d]`` float32 on the device of the ids."""
        encoded = self.clip_tokenizer(
            self.texts(input_ids, counted), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        device = next(self.text_model.parameters()).device
        output = self.text_model(**{name: value.to(device) for name, value in encoded.items()})
        if self.projected:
            feature = output.text_embeds
        elif hasattr(self.text_model, "text_projection"):
            feature = self._pooled(output, encoded["input_ids"].to(device))
        else:
            feature = output.pooler_output
        return feature.float().to(input_ids.device)

    def _pooled(self, output: Any, ids: Tensor) -> Tensor:
        """The un-projected pooled output of a model that returns the projected one: the state at the end token."""
        config = self.text_model.config
        ends = ids.argmax(-1) if config.eos_token_id == 2 else (ids == config.eos_token_id).int().argmax(-1)
        return output.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]

    def describe(self) -> dict[str, Any]:
        """What is computed."""
        kind = "clip, projected" if self.projected else "clip, pooled"
        return {"text": kind, "part": self.part, "max_tokens": self.max_tokens}


class Features:
    """The two feature functions of a model.

    Args:
        image: None for a model without images.
        text: None to route by images alone.
    """

    def __init__(self, image: ImageFeature | None, text: TextFeature | None) -> None:
        if image is None and text is None:
            raise ValueError("image, text: expected at least one of them, got None twice")
        self.image, self.text = image, text

    def describe(self) -> dict[str, Any]:
        """Both descriptions in one, as JSON would give them back."""
        found: dict[str, Any] = {}
        for part in (self.image, self.text):
            found |= {} if part is None else part.describe()
        return json.loads(json.dumps(found))
