"""The linear layers of a model by their canonical names, with or without PEFT's wrappers around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpa_ext.models.structure import decoder_name, in_module, is_conv1d, unwrap
from hpa_ext.ops._backend import without_autocast


@dataclass(frozen=True)
class Linear:
    """A linear layer of a model.

    Attributes:
        name: its name in the plain transformers model, without PEFT's prefixes.
        module: what the model calls: an ``nn.Linear``, a ``Conv1D``, or PEFT's LoRA layer around one.
        original: the layer that `module` is PEFT's trained copy of (``modules_to_save``), else None.
    """

    name: str
    module: nn.Module
    original: nn.Module | None = None

    @property
    def base(self) -> nn.Module:
        """The layer itself, inside PEFT's wrapper if there is one."""
        return self.module.get_base_layer() if _is_lora(self.module) else self.module

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]`` (Conv1D)."""
        return not isinstance(self.base, nn.Linear)

    def base_weight(self) -> Tensor:
        """The stored weight as a detached view ``[out, in]``; writing to it writes to the layer."""
        weight = self.base.weight.detach()
        return weight.mT if self.is_transposed else weight

    def weight(self) -> Tensor:
        """The weight that acts, ``[out, in]``: the stored one, with the active LoRA updates that are not merged yet.

        The sum is formed in float32 and rounded once to the dtype of the stored weight, as PEFT's merge does.
        """
        base = self.base_weight()
        adapters = self._pending()
        if not adapters:
            return base
        total = base.float()
        for adapter in adapters:
            with without_autocast(base):
                delta = self.module.get_delta_weight(adapter).detach()
            total = total + (delta.mT if self.is_transposed else delta).to(device=base.device, dtype=torch.float32)
        return total.to(base.dtype)

    def absorb_adapters(self) -> None:
        """Declare that the stored weight now contains the active adapters: each B becomes zero, A stays.

        The wrapper then adds nothing, and a further tuning step starts as a fresh LoRA does.
        """
        if not _is_lora(self.module):
            return
        for adapter in (*self._pending(), *self.module.merged_adapters):
            self.module.lora_B[adapter].weight.data.zero_()
        self.module.merged_adapters.clear()

    def refuse_unsupported(self) -> None:
        """Raise ValueError for a wrapper or a weight that this library cannot merge exactly."""
        weight = self.base.weight
        if weight.device.type == "meta":
            raise ValueError(f"{self.name}: its weight is not loaded (device meta)")
        if not weight.dtype.is_floating_point:
            raise ValueError(
                f"{self.name}: expected a floating-point weight, got {type(self.base).__name__} with {weight.dtype} "
                "(quantised); load the base model unquantised"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
            raise ValueError(f"{self.name}: its weight is an expanded view, which cannot be written; clone it first")
        if not _is_lora(self.module):
            return
        if self.module.disable_adapters and self.module.merged_adapters:
            raise ValueError(
                f"{self.name}: its adapters {self.module.merged_adapters} are merged and also disabled, so that PEFT "
                "will take them out at the next forward; call unmerge_adapter() or enable them"
            )
        for adapter in (*self._pending(), *self.module.merged_adapters):
            if adapter in getattr(self.module, "lora_variant", {}) or getattr(self.module, "use_dora", {}).get(adapter):
                raise ValueError(
                    f"{self.name}: adapter {adapter!r} is a LoRA variant (such as DoRA), whose update is not B A; "
                    "call merge_and_unload() and pass the plain model"
                )
            if getattr(self.module, "lora_bias", {}).get(adapter):
                raise ValueError(
                    f"{self.name}: adapter {adapter!r} has lora_bias; call merge_and_unload() and pass the plain model"
                )

    def has_pending_adapters(self) -> bool:
        """Whether an active LoRA update is not in the stored weight."""
        return bool(self._pending())

    def _pending(self) -> list[str]:
        if not _is_lora(self.module) or self.module.disable_adapters:
            return []
        merged = set(self.module.merged_adapters)
        return [name for name in self.module.active_adapters if name in self.module.lora_A and name not in merged]


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
        is_table = isinstance(owner, nn.Embedding) or _is_linear(owner)
        for key, value in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{key}" if owner_name else key
            is_router = value.dim() == 2 and key == "weight" and not is_table
            if (value.dim() == 3 or is_router) and in_module(name, parent):
                found.append(name.replace(".base_layer.", "."))
    return found


def _examples(found: dict[str, Linear]) -> str:
    names = list(found)[:3]
    return f"; it has {len(found)}, such as {', '.join(names)}" if names else "; it has none"


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Linear layers below `module`, seen through PEFT's wrappers, under the names they have without them.

    With each the layer that it is a trained copy of (``modules_to_save``), else None.
    """
    if hasattr(module, "get_base_layer"):
        if not _is_linear(module.get_base_layer()):
            return
        if not _is_lora(module):
            raise TypeError(
                f"{name}: expected plain layers or LoRA, got PEFT's {type(module).__name__}; "
                "call merge_and_unload() and pass the plain model"
            )
        yield name, module, None
        return
    if _is_linear(module):
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
