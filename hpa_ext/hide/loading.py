"""What the command line needs from disk: base models, their structure, processors, CLIP, batches of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpa_ext.hide.features import Features
from hpa_ext.hide.own_features import clip_features, described_features, own_features


def load_base(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """A base model in evaluation mode with what reads its weights again; nothing is downloaded, no code of it is run.

    Args:
        path: a checkpoint in safetensors, of transformers or of the original LLaVA.
        device: where it goes.
        dtype: None for that on disk.

    Raises:
        OSError, CheckpointError: it is absent, broken, or lacks tensors.
    """
    from transformers import GenerationConfig

    from hpa_ext.calibrating.loading import LoadableModel, missing_tensors
    from hpa_ext.checkpoints.weights import CheckpointWeights

    weights = CheckpointWeights(path)
    missing_tensors(weights, lambda name: True)
    loadable = LoadableModel(weights, torch.device(device), dtype)
    loadable.load(lambda name: True)
    model = loadable.module
    model.config.name_or_path = str(path)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, weights


def features_of(
    description: Mapping[str, Any] | None,
    model: nn.Module,
    processor: Any,
    clip: str | Path | None,
    *,
    image: str | None = None,
    projected_text: bool = False,
    part: str = "instruction",
) -> Features:
    """Feature functions, from a description or from choices.

    Args:
        description: of anchors that are there already; the choices then have no part.
        model: the base model.
        processor: its processor or tokenizer.
        clip: directory of a CLIP model; None for the model's own features.
        image, projected_text, part: see `clip_features`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    clip_model, clip_tokenizer = (None, None) if clip is None else _load_clip(clip)
    if description is not None:
        return described_features(description, model, clip_model, clip_tokenizer, tokenizer)
    if clip_model is None:
        if image == "projected" or projected_text:
            raise ValueError("clip: expected the CLIP model to project with, got none")
        found = own_features(model, tokenizer)
        if image is not None and found.image is not None:
            found.image.kind = image
        return found
    return clip_features(
        clip_model, clip_tokenizer, tokenizer, image=image or "projected", projected_text=projected_text, part=part
    )


def data_batches(
    path: str | Path,
    processor: Any,
    dtype: torch.dtype,
    images: str | Path | None = None,
    samples: int | None = None,
    batch_size: int = 8,
    answers: bool = True,
) -> Iterator[dict[str, Any]]:
    """Model inputs of a data file; answers, if they are in it, are marked by labels. Errors as `load_conversations`."""
    from hpa_ext.data.encoding import ConversationEncoder
    from hpa_ext.data.records import load_conversations

    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    conversations = list(load_conversations(path, images, samples))
    encoder = ConversationEncoder(processor)
    for start in range(0, len(conversations), batch_size):
        chosen = conversations[start : start + batch_size]
        batch = encoder.batch(chosen, labels=answers, answered=answers)
        yield {
            key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in batch.items()
        }


def _load_clip(path: str | Path) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer, CLIPModel

    if not Path(path).is_dir():
        raise NotADirectoryError(f"{path}: expected the directory of a CLIP model")
    model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
