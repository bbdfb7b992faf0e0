"""Finding the linear layers of a model by their canonical names, with or without PEFT's wrappers around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from hpa_ext.models.linear import Linear, is_linear, is_lora
from hpa_ext.models.structure import decoder_name, in_module, unwrap


def find_linears(model: nn.Module, modules: str | Iterable[str] | None = None) -> dict[str, Linear]:
    """The linear layers that take part, in the model's order, by canonical name.

    Args:
        model: a transformers model, a PeftModel around one, or any ``nn.Module``.
        modules: a regular expression that must match a whole name, or a collection of names. None: every linear of the
            language model's decoder (not the vision tower, the projector or the output head).

    Raises:
        ValueError: nothing matches, a listed name does not exist, or the expression is malformed.
        TypeError: a PEFT layer other than LoRA is in the way.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    plain = unwrap(model)
    found = {name: Linear(name, module, original) for name, module, original in _walk(plain, "")}
    if modules is None:
        if getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"modules: {type(plain).__name__} is an encoder-decoder, which has no single decoder to choose by "
                "default; name the modules"
            )
        parent = decoder_name(plain)
        chosen = {name: linear for name, linear in found.items() if in_module(name, parent)}
    elif isinstance(modules, (str, re.Pattern)):
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise ValueError(f"modules: not a regular expression: {modules!r} ({error})") from error
        chosen = {name: linear for name, linear in found.items() if pattern.fullmatch(name)}
        inside = [name for name in found if pattern.search(name)]
        if inside and not chosen:
            raise ValueError(
                f"modules: no linear layer of {type(plain).__name__} matches {pattern.pattern!r} with its whole name; "
                f"{len(inside)} match with a part of it, such as {inside[0]}: put .* before or after it"
            )
    else:
        if not isinstance(modules, Iterable):
            raise TypeError(f"modules: expected a regular expression or names, got {type(modules).__name__}")
        names = list(modules)
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"modules: no linear layer is called {missing[0]!r}{_examples(found)}")
        wanted = set(names)
        chosen = {name: linear for name, linear in found.items() if name in wanted}
    if not chosen:
        raise ValueError(f"modules: no linear layer of {type(plain).__name__} matches {modules!r}{_examples(found)}")
    return chosen


def experts_without_linears(model: nn.Module) -> list[str]:
    """Parameters of the decoder that are weights of linears but no linear modules: stacked experts, and routers."""
    plain = unwrap(model)
    parent = decoder_name(plain)
    found = []
    for owner_name, owner in plain.named_modules():
        is_table = isinstance(owner, nn.Embedding) or is_linear(owner)
        for key, value in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{key}" if owner_name else key
            is_router = value.dim() == 2 and key == "weight" and not is_table
            if (value.dim() == 3 or is_router) and in_module(name, parent):
                found.append(name.replace(".base_layer.", "."))
    return found


def _examples(found: dict[str, Linear]) -> str:
    names = list(found)[:3]
    return f"; it has {len(found)}, such as {', '.join(names)}" if names else "; it has none"


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Linear layers below `module`, seen through PEFT's wrappers, under the names they have without them.

    With each the layer that it is a trained copy of (``modules_to_save``), else None.
    """
    if hasattr(module, "get_base_layer"):
        if not is_linear(module.get_base_layer()):
            return
        if not is_lora(module):
            raise TypeError(
                f"{name}: expected plain layers or LoRA, got PEFT's {type(module).__name__}; "
                "call merge_and_unload() and pass the plain model"
            )
        yield name, module, None
        return
    if is_linear(module):
        yield name, module, None
        return
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [key for key in module.active_adapters if key in module.modules_to_save]
        use_copy = active and not module.disable_adapters
        originals = {key: layer for key, layer, _ in _walk(module.original_module, name)}
        for key, layer, _ in _walk(module.modules_to_save[active[0]] if use_copy else module.original_module, name):
            yield key, layer, originals[key] if use_copy else None
        return
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name)
