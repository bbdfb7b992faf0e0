"""What HiDe asks of a model's structure: the number of a layer, the vision tower, the projector, the output head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hpa_ext.models.structure import decoder_name, in_module

_TOWERS = ("vision_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "mm_projector")


def layer_number(model: nn.Module, name: str) -> tuple[int, int]:
    """0-based number of the decoder layer that holds a module, and the number of layers.

    A module after the layers, such as the output head, is in the last one.
    """
    layers = layer_count(model)
    module: nn.Module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return int(part), len(module)
        module = getattr(module, part)
    return layers - 1, layers


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder's layers. ValueError if the decoder has no list of layers."""
    parent = decoder_name(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and in_module(name, parent) and len(module):
            return [(f"{name}.{number}", layer) for number, layer in enumerate(module)]
    raise ValueError(f"model: expected a decoder with a list of layers, got {type(model).__name__} without one")


def layer_count(model: nn.Module) -> int:
    """How many layers the decoder has."""
    return len(decoder_layers(model))


def vision_tower_name(model: nn.Module) -> str | None:
    """Name of the model's vision tower, None for a model without one."""
    return _first_named(model, _TOWERS)


def projector_name(model: nn.Module) -> str | None:
    """Name of the projector from vision features to the language model, None for a model without one."""
    return _first_named(model, PROJECTORS)


def output_head_name(model: nn.Module) -> str | None:
    """Name of the output head, None for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module where the one called `name` is."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(child)] = module
    else:
        setattr(parent, child, module)


def without_weights(model: nn.Module) -> nn.Module:
    """The same modules with every tensor on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _first_named(model: nn.Module, names: tuple[str, ...]) -> str | None:
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in names:
            return name
    return None
