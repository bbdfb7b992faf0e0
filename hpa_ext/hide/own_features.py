"""The features that a model can be routed by with nothing else at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hpa_ext.hide.features import ClipText, EmbeddingText, Features, ImageFeature
from hpa_ext.hide.structure import vision_tower_name


def own_features(model: nn.Module, tokenizer: Any | None = None) -> Features:
    """Features of the model's own parts.

    Args:
        model: a plain transformers model.
        tokenizer: its tokenizer, whose special tokens then do not count; None counts every token of the prompt.

    Images: the pooled output of its vision tower (CLIP's class token before the projection), None without a tower.
    Text: the mean embedding of the prompt's tokens. This is **not** CLIP's text feature, which the paper uses; for that
    see `clip_features`.
    """
    image = None if vision_tower_name(model) is None else ImageFeature("pooled")
    skip = [] if tokenizer is None else tokenizer.all_special_ids
    return Features(image, EmbeddingText(model.get_input_embeddings(), skip))


def clip_features(
    clip: nn.Module,
    clip_tokenizer: Any,
    tokenizer: Any,
    *,
    image: str = "projected",
    projected_text: bool = False,
    part: str = "instruction",
    max_tokens: int = 77,
) -> Features:
    """The paper's features; the defaults are the authors' choices, mixed as they are.

    Args:
        clip: transformers' ``CLIPModel`` that the vision tower comes from (LLaVA-1.5:
            openai/clip-vit-large-patch14-336). Of its vision side only the projection is used; the tower that runs is
            the model's own.
        clip_tokenizer: its tokenizer.
        tokenizer: the language model's tokenizer.
        image: "projected" (the authors': CLIP's image embedding), "pooled" or "mean".
        projected_text: False (the authors': the pooled output of the text tower, not projected) or True.
        part: "instruction" (the authors': from the first newline to " ASSISTANT") or "prompt".
        max_tokens: 77 in the authors' code.
    """
    projection: Tensor | None = clip.visual_projection.weight if image == "projected" else None
    text = ClipText(
        _ProjectedText(clip) if projected_text else clip.text_model, clip_tokenizer, tokenizer,
        projected=projected_text, part=part, max_tokens=max_tokens,
    )  # fmt: skip
    return Features(ImageFeature(image, projection), text)


def wants_clip(description: Mapping[str, Any]) -> bool:
    """Whether the features that `Features.describe` wrote down need CLIP beside the model."""
    return description.get("image") == "projected" or str(description.get("text")).startswith("clip")


def described_features(
    description: Mapping[str, Any] | None, model: nn.Module, clip: nn.Module | None, clip_tokenizer: Any, tokenizer: Any
) -> Features:
    """The feature functions that `Features.describe` wrote down.

    Args:
        description: None for the model's own.
        model: a plain transformers model.
        clip, clip_tokenizer: transformers' ``CLIPModel`` and its tokenizer, or None where they are not needed.
        tokenizer: the language model's tokenizer, or None.

    Raises:
        ValueError: the description asks for CLIP and none was given, or is not understood.
    """
    if description is None:
        return own_features(model, tokenizer)
    text, image = description.get("text"), description.get("image")
    if wants_clip(description) and clip is None:
        raise ValueError(f"clip: expected the CLIP model whose features these are ({dict(description)}), got none")
    found_image = None
    if image is not None:
        found_image = ImageFeature(image, clip.visual_projection.weight if image == "projected" else None)
    if text == "embedding":
        found_text = EmbeddingText(model.get_input_embeddings(), description["skip_ids"])
    elif text in ("clip, pooled", "clip, projected"):
        found_text = clip_features(
            clip, clip_tokenizer, tokenizer, projected_text=text == "clip, projected", part=description["part"],
            max_tokens=description["max_tokens"],
        ).text  # fmt: skip
    elif text is None:
        found_text = None
    else:
        raise ValueError(f"features: expected a description by this version, got {dict(description)}")
    return Features(found_image, found_text)


class _ProjectedText(nn.Module):
    """The text side of a CLIPModel, as CLIPTextModelWithProjection gives it."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.text_model, self.text_projection, self.config = (
            clip.text_model,
            clip.text_projection,
            clip.config.text_config,
        )

    def forward(self, **inputs: Tensor) -> Any:
        """With ``text_embeds``."""
        output = self.text_model(**inputs)
        output.text_embeds = self.text_projection(output.pooler_output)
        return output
