"""Experts from what a task's training left: a PEFT directory, a PeftModel, or tensors by PEFT's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpa_ext.hide.experts import Expert, ExpertUpdate, check_expert
from hpa_ext.models.linear import is_lora
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import unwrap

_FACTOR = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$"
)
_SAVED = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)$")


def read_expert(task: str, source: Any, model: nn.Module) -> Expert:
    """The expert of one task, checked against the base model.

    Args:
        task: its name.
        source: a PEFT LoRA directory (path), a ``PeftModel`` with one adapter, ``(PeftModel, adapter name)``,
            ``(state dict, scaling)`` with PEFT's names, or an `Expert`, which gets this task's name.
        model: the plain base model, or a skeleton of it.

    Raises:
        TypeError, ValueError, OSError: it is none of these, cannot be read, is not plain LoRA (DoRA, a bias), or does
            not fit the model. Named.
    """
    if not isinstance(task, str) or not task:
        raise ValueError(f"adapters: expected names of tasks, got {task!r}")
    if isinstance(source, Expert):
        expert = Expert(task, dict(source.updates), dict(source.projector))
    elif isinstance(source, (str, Path)):
        expert = _from_directory(task, Path(source), model)
    elif hasattr(source, "peft_config"):
        expert = _from_peft_model(task, source, None)
    elif isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "peft_config"):
        expert = _from_peft_model(task, *source)
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        expert = _from_state_dict(task, *source, model)
    else:
        raise TypeError(
            f"adapters[{task!r}]: expected a PEFT directory, a PeftModel, (PeftModel, adapter name), (state dict, "
            f"scaling) or an Expert, got {type(source).__name__}"
        )
    check_expert(expert, model)
    return expert


def read_experts(adapters: Any, model: nn.Module, tasks: list[str] | None = None) -> list[Expert]:
    """Experts in order: of a mapping by task; of a PeftModel's adapters by name; of a sequence, named by `tasks`."""
    if hasattr(adapters, "peft_config"):
        named = {name: (adapters, name) for name in adapters.peft_config}
    elif isinstance(adapters, Mapping):
        named = dict(adapters)
    elif isinstance(adapters, (list, tuple)):
        if tasks is None or len(tasks) != len(adapters):
            raise ValueError(
                f"adapters: expected a mapping by task, or {len(tasks or [])} adapters in the order of the anchors, "
                f"got {len(adapters)}"
            )
        named = dict(zip(tasks, adapters, strict=True))
    else:
        raise TypeError(
            f"adapters: expected a mapping by task, a sequence or a PeftModel, got {type(adapters).__name__}"
        )
    return [read_expert(task, source, model) for task, source in named.items()]


def _from_directory(task: str, directory: Path, model: nn.Module) -> Expert:
    from hpa_ext.checkpoints.adapter import LoraAdapter

    adapter = LoraAdapter(directory, unwrap(model))
    updates = {}
    alone = [name for name in adapter.gain if name not in adapter.updates]
    if alone:
        raise ValueError(f"{directory}: {alone[0]}: has a gain and no LoRA update, so it cannot be an expert")
    for name, update in adapter.updates.items():
        gain = adapter.gain.get(name)
        if update.magnitude is not None:
            raise ValueError(f"{directory}: {name}: DoRA's update is not s B A, so it cannot be an expert")
        if update.b_bias is not None:
            raise ValueError(f"{directory}: {name}: lora_bias adds a bias, so it cannot be an expert")
        updates[name] = ExpertUpdate(update.a, update.b, update.scaling, None if gain is None else gain.float() - 1)
    # PEFT saves the weight under an embedding's LoRA along with it; that is the base's own.
    replaced = {name: value for name, value in adapter.replaced.items() if name not in adapter.base_copies}
    return Expert(task, updates, replaced)


def _from_peft_model(task: str, model: nn.Module, adapter: str | None) -> Expert:
    names = list(model.peft_config)
    if adapter is None and len(names) != 1:
        raise ValueError(f"adapters[{task!r}]: expected a PeftModel with one adapter, got {len(names)}; name one")
    adapter = names[0] if adapter is None else adapter
    if adapter not in names:
        raise ValueError(f"adapters[{task!r}]: expected an adapter of {', '.join(names)}, got {adapter!r}")
    updates = {}
    for name, linear in find_linears(model, ".*").items():
        layer = linear.module
        if not is_lora(layer) or adapter not in layer.lora_A:
            continue
        if adapter in layer.merged_adapters:
            raise ValueError(f"{name}: adapter {adapter!r} is merged into the base; call unmerge_adapter() first")
        if adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter):
            raise ValueError(f"{name}: adapter {adapter!r} is a LoRA variant (such as DoRA), whose update is not s B A")
        if getattr(layer, "lora_bias", {}).get(adapter):
            raise ValueError(f"{name}: adapter {adapter!r} has lora_bias, so it cannot be an expert")
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        updates[name] = ExpertUpdate(_kept(a), _kept(b), float(layer.scaling[adapter]))
    return Expert(task, updates, dict(_saved_copies(unwrap(model), "", adapter)))


def _saved_copies(module: nn.Module, name: str, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters of PEFT's trained copies (``modules_to_save``), under the names that they have in the plain model."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        if adapter in module.modules_to_save:
            for key, value in module.modules_to_save[adapter].named_parameters():
                yield f"{name}.{key}", _kept(value)
        return
    for child_name, child in module.named_children():
        yield from _saved_copies(child, f"{name}.{child_name}" if name else child_name, adapter)


def _from_state_dict(task: str, tensors: Mapping[str, Tensor], scaling: float, model: nn.Module) -> Expert:
    from hpa_ext.models.key_names import KeyNames

    names = KeyNames(unwrap(model))
    factors: dict[str, dict[str, Tensor]] = {}
    projector: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _FACTOR.match(key)
        disk = f"{match['module']}.weight" if match else _SAVED.match(key)["name"]
        name = names.canonical(disk)
        if name is None:
            raise ValueError(
                f"adapters[{task!r}]: tensor {key!r} fits nowhere in {type(unwrap(model)).__name__}; tried "
                f"{', '.join(names.tried(disk))}"
            )
        if match is None:
            projector[name] = _kept(value)
            continue
        found = factors.setdefault(name.removesuffix(".weight"), {})
        if match["factor"] in found:
            raise ValueError(f"adapters[{task!r}]: {name} has two {match['factor']}; pass one adapter at a time")
        found[match["factor"]] = _kept(value)
    for name, found in factors.items():
        if len(found) != 2:
            raise ValueError(f"adapters[{task!r}]: {name} has lora_{next(iter(found))} alone, expected A and B")
    updates = {name: ExpertUpdate(found["A"], found["B"], float(scaling)) for name, found in factors.items()}
    return Expert(task, updates, projector)


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later training does not reach."""
    return tensor.detach().to("cpu", copy=True)
