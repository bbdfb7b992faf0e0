"""Reading the prompts of a batch from a model's inputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.hide.routing_state import Prompt
from hpa_ext.models.structure import image_token_id
from hpa_ext.token_masks import IGNORED_LABEL


def bound_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def prompt_of(model: nn.Module, inputs: dict[str, Any]) -> Prompt | None:
    """The prompts of a batch, None without ids.

    With labels the prompt is what has none; a row in which every token has one counts whole.

    Raises:
        ValueError: ids or mask of another shape than ``[b, tokens]``.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        return None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids: expected [batch, tokens], got {got}")
    mask = inputs.get("attention_mask")
    if mask is None:
        counted = torch.ones_like(ids, dtype=torch.bool)
    elif not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected {list(ids.shape)}, from which padding is seen, got {got}")
    else:
        counted = mask[:, -ids.shape[1] :].to(ids.device).bool()
    token = image_token_id(model)
    is_image = torch.zeros_like(counted) if token is None else ids == token
    labels = inputs.get("labels")
    if labels is not None:
        prompt = counted & (labels.to(ids.device) == IGNORED_LABEL)
        counted = torch.where(prompt.any(1, keepdim=True), prompt, counted)
    length = getattr(getattr(model, "config", None), "image_seq_length", None)
    return Prompt(ids, counted & ~is_image, (is_image & _attended(mask, ids)).sum(1), length)


def _attended(mask: Tensor | None, ids: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].to(ids.device).bool()
