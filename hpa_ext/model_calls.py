"""Calling a model for its activations: its inputs from a batch, no cache, evaluation mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.models.linear import Linear


def model_inputs(batch: Any, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a batch, tensors on the model's device."""
    if isinstance(batch, Mapping):
        return (), {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, Tensor) for value in batch):
        return tuple(value.to(device) for value in batch), {}
    raise TypeError(f"batches: expected mappings, tensors or tuples of tensors, got {type(batch).__name__}")


def move(value: Any, device: torch.device) -> Any:
    """A tensor on the device; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def head_names(model: nn.Module, linears: dict[str, Linear]) -> set[str]:
    """The names of the linears that are the model's output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = set() if head is None else {id(module) for module in head.modules()}
    return {name for name, linear in linears.items() if id(linear.module) in inside}


def forward_options(model: nn.Module, all_logits: bool) -> dict[str, Any]:
    """No cache, which would grow at every batch, and logits of one position only, where the model takes these.

    The output head needs all positions if it is calibrated itself.
    """
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 0 if all_logits else _last_position(model)}
    chosen = {key: value for key, value in options.items() if key in accepted}
    # LLaVA and its kin hand what they do not name on to the language model.
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    text = model.config.get_text_config() if hasattr(getattr(model, "config", None), "get_text_config") else None
    if hands_on and hasattr(text, "use_cache"):
        chosen["use_cache"] = False
    return chosen


def _last_position(model: nn.Module) -> int | Tensor:
    """The last position as transformers' `logits_to_keep` takes it: a count, or a tensor of indices.

    A count gives the head a slice. On the CPU torch multiplies a slice of several samples sample by sample, and copies
    the head's weight for each; what an index picks is contiguous, and is one product.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return torch.tensor([-1]) if on_cpu else 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
