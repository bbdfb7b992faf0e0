"""The column gain of a harmonized adapter inside PEFT's LoRA layers: ``y = W (g * x) + s B A x``.

In the forward pass a hook scales the input of the base layer alone, whatever the base layer does with it: a quantised
one stays as it is. For merging and unmerging PEFT asks a `LoraVariant`, of which DoRA is another.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from hpa_ext.checkpoints.lora_update import LoraUpdate, Step, apply_steps

_ATTRIBUTE = "hpa_gain"


class GainVariant(LoraVariant):
    """Tells PEFT how a LoRA layer with a gain merges; `gain_of` has the gain."""

    def supports_lora_conversion(self) -> bool:
        """No: a low-rank approximation would lose the gain."""
        return False

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """``W diag(g) + s B A`` in a new tensor, summed in float32 and rounded once."""
        if module.merged_adapters:
            raise ValueError(
                f"adapter {active_adapter!r} has a column gain, which would scale {module.merged_adapters} too, merged "
                "before it; load all steps in order with hpa_ext.load_adapter([...]) and merge them together"
            )
        if not orig_weight.is_floating_point():
            raise ValueError(
                f"adapter {active_adapter!r}: the base weight is {orig_weight.dtype} (quantised), into which nothing "
                "can be merged; load the adapter onto the unquantised base and merge there"
            )
        a, b = (half[active_adapter].weight.detach() for half in (module.lora_A, module.lora_B))
        transposed = bool(getattr(module, "fan_in_fan_out", False))
        update = LoraUpdate(a, b, module.scaling[active_adapter], transposed=transposed)
        step = Step(gain_of(module, active_adapter, orig_weight.device), update)
        return apply_steps(orig_weight.detach(), [step], transposed=transposed)

    @staticmethod
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> None:
        """As `merge_safe`, in place."""
        orig_weight.data = GainVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight before merging, to rounding; ValueError where a gain of 0 has erased a column."""
        gain = _stored_gain(module, active_adapter, orig_weight)
        if bool((gain == 0).any()):
            raise ValueError(f"adapter {active_adapter!r} has a gain of 0, which cannot be undone; load the base again")
        dtype = torch.promote_types(orig_weight.dtype, torch.float32)
        total = orig_weight.data.to(dtype) - module.get_delta_weight(active_adapter).to(dtype)
        return (total / gain.to(dtype)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Plain LoRA on top of the base layer's result, whose input the hook has scaled."""
        low_rank = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + module.lora_B[active_adapter](low_rank) * module.scaling[active_adapter]


class GainHook:
    """Scales the input of a base layer while an adapter with a gain acts on its LoRA layer, and not otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            return None
        names = [name for name in layer.active_adapters if has_gain(layer, name)]
        if not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"adapters {names} each have a column gain; they are steps, not parts: load them in order with "
                "hpa_ext.load_adapter(model, [first, second])"
            )
        x = inputs[0]
        # In float32: a gain such as 0.999 is 1 in bfloat16.
        return ((x * gain_of(layer, names[0], x.device)).to(x.dtype), *inputs[1:])


def attach_gain(layer: nn.Module, adapter: str, gain: Tensor) -> None:
    """Let an adapter of a LoRA layer act with a gain ``[in]`` on the base layer's input."""
    gains = getattr(layer, _ATTRIBUTE, None)
    if gains is None:
        gains = {}
        # A plain dict, not a buffer: model.to(bfloat16) must not round the gains.
        setattr(layer, _ATTRIBUTE, gains)
        layer.get_base_layer().register_forward_pre_hook(GainHook(layer))
        # Per-sample adapters run the base layer once for all samples.
        layer._mixed_batch_forward = _refuse_mixed_batch
    gains[adapter] = gain.detach().to("cpu", torch.float32)
    layer.lora_variant[adapter] = GainVariant()
    if "lora_variant" not in type(layer).merge.__code__.co_names:
        refuse = functools.partial(_refuse_merge, type(layer).__name__)
        layer.merge, layer.unmerge = refuse, refuse


def has_gain(layer: nn.Module, adapter: str) -> bool:
    """Whether an adapter acts on this LoRA layer with a gain; false once PEFT has deleted it."""
    return isinstance(getattr(layer, "lora_variant", {}).get(adapter), GainVariant)


def gain_of(layer: nn.Module, adapter: str, device: torch.device | None = None) -> Tensor:
    """The gain, float32 ``[in]``, on `device`."""
    gains = getattr(layer, _ATTRIBUTE)
    if device is not None and gains[adapter].device != device:
        gains[adapter] = gains[adapter].to(device)
    return gains[adapter]


def detach_hooks(model: nn.Module) -> None:
    """Remove the hooks from layers that have lost their LoRA."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, GainHook):
                del module._forward_pre_hooks[key]


def _stored_gain(layer: nn.Module, adapter: str, weight: Tensor) -> Tensor:
    gain = gain_of(layer, adapter, weight.device)
    return gain[:, None] if getattr(layer, "fan_in_fan_out", False) else gain


def _refuse_mixed_batch(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "adapter_names: not possible with an adapter that has a column gain; run each adapter's samples alone"
    )


def _refuse_merge(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        f"{kind}: merging an adapter with a column gain into this kind of quantised layer is not possible; load the "
        "adapter onto the unquantised base and merge there"
    )
