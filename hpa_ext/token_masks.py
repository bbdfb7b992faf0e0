"""Which tokens of a batch count in calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.models.structure import image_token_id

IGNORED_LABEL = -100

TokenMask = str | Callable[[Mapping[str, Any]], Tensor]


def all_tokens(batch: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """Every token, padding included."""
    return None


def attended(batch: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """Tokens with attention_mask 1; all of them if the batch has no attention_mask."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f'attention_mask: expected [batch, tokens] for token_mask="attended", got {came}')
    return mask.bool()


def response(batch: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Attended tokens that carry a label."""
    return _among_attended(batch, model, _labels(batch) != IGNORED_LABEL)


def prompt(batch: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Attended tokens without a label, images included."""
    return _among_attended(batch, model, _labels(batch) == IGNORED_LABEL)


def image(batch: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Attended positions that image features take."""
    token = image_token_id(model)
    if token is None:
        raise ValueError(f'token_mask="image": the configuration of {type(model).__name__} names no image token')
    return _among_attended(batch, model, _required(batch, "input_ids") == token)


TOKEN_MASKS: dict[str, Callable[[Mapping[str, Any], nn.Module], Tensor | None]] = {
    "all": all_tokens,
    "attended": attended,
    "prompt": prompt,
    "image": image,
    "response": response,
}


def resolve(token_mask: TokenMask | None) -> Callable[[Mapping[str, Any], nn.Module], Tensor | None]:
    """The function ``(batch, model) -> mask [batch, tokens] or None (all)`` for the user's choice."""
    if token_mask is None:
        return all_tokens
    if callable(token_mask):
        return lambda batch, model: token_mask(batch)
    if isinstance(token_mask, str) and token_mask in TOKEN_MASKS:
        return TOKEN_MASKS[token_mask]
    names = ", ".join(TOKEN_MASKS)
    raise ValueError(f"token_mask: expected one of {names}, or a function of the batch, got {token_mask!r}")


def _required(batch: Mapping[str, Any], key: str) -> Tensor:
    value = batch.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"token_mask: the batch has no tensor {key!r}, only {sorted(batch)}")
    return value


def _labels(batch: Mapping[str, Any]) -> Tensor:
    return _required(batch, "labels")


def _among_attended(batch: Mapping[str, Any], model: nn.Module, mask: Tensor) -> Tensor:
    others = attended(batch, model)
    return mask if others is None else mask & others.to(mask.device)


def check_mask(mask: object) -> Tensor | None:
    """The mask as bool ``[batch, tokens]``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype not in (torch.bool, torch.int64, torch.int32):
        shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"token_mask: expected a bool tensor [batch, tokens], got {shape}")
    return mask.bool()
