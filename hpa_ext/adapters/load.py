"""Loading LoRA adapters, plain or harmonized, onto a model in memory, and merging them into it."""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.compose import compose_adapters
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.harmonized_adapter import mark_gain
from hpa_ext.models.linear import is_lora

if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(
    model: nn.Module,
    adapters: str | Path | Sequence[str | Path],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Put an adapter that HPA has written, or any LoRA adapter, onto a transformers model.

    Args:
        model: the base model, quantised or not; PEFT's wrappers are put into it.
        adapters: the adapter's directory, or several: the steps in order. Several act as `compose_adapters` says, and
            lie in a temporary directory while they are loaded.
        adapter_name: PEFT's name for it.
        is_trainable: whether A and B may be trained further. The gain stays as it is.

    Returns:
        A PeftModel whose layers compute ``W (g * x) + s B A x``. Disabling, merging and deleting the adapter, moving
        and copying the model work as with PEFT; `save_pretrained` writes the gain too. A further adapter may be added
        and trained on top.

    Raises:
        OSError: a file is absent.
        CheckpointError: the adapter does not fit the model, or a tensor of it is not in the model after loading.
        TypeError: `model` has adapters already.

    The adapter may have been trained under older names of the model's layers. Under autocast and in 16 bits the gain is
    applied in float32 and the scaled input rounded once.
    """
    from hpa_ext.adapters.gain import attach_gain

    if not isinstance(model, nn.Module) or hasattr(model, "peft_config"):
        kind = type(model).__name__
        raise TypeError(f"model: expected a transformers model without adapters, got {kind}; load all steps at once")
    if not isinstance(adapters, (str, Path)):
        steps = list(adapters)
        if len(steps) != 1:
            with tempfile.TemporaryDirectory(prefix="hpa_ext-") as directory:
                composed = compose_adapters(steps, Path(directory) / "composed", base=model)
                return load_adapter(model, composed, adapter_name=adapter_name, is_trainable=is_trainable)
        adapters = steps[0]
    source = LoraAdapter(adapters, model)
    try:
        loaded = _load_with_peft(model, source, adapter_name, is_trainable)
        base = loaded.get_base_model()
        try:
            _check_loaded(base, source, adapter_name)
        except BaseException:
            loaded.unload()
            raise
        _fill_in(base, source)
        for name, gain in source.gain.items():
            attach_gain(base.get_submodule(name), adapter_name, gain)
    finally:
        source.close()
    if source.gain:
        _keep_gain(loaded)
    return loaded.train(is_trainable)


def merge_adapter(model: PeftModel) -> nn.Module:
    """The plain transformers model with the active adapters merged into its weights, gain included; uses up `model`.

    Each weight is ``W diag(g) + s B A``, summed in float32 and rounded once to its dtype, as `harmonize_checkpoint`
    writes it. 4-bit and 8-bit layers of bitsandbytes are quantised anew, with PEFT's warning.

    Raises:
        TypeError: not a PeftModel.
        ValueError: a quantised layer of a kind that cannot be merged.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"model: expected what load_adapter returned, got {type(model).__name__}")
    for name, layer in model.get_base_model().named_modules():
        # PEFT's general layer takes any subclass of nn.Linear, and would add to the integers.
        if is_lora(layer) and type(layer).__module__.endswith("lora.layer"):
            weight = layer.get_base_layer().weight
            if not weight.is_floating_point():
                raise ValueError(
                    f"{name}: its weight is {weight.dtype} (quantised), into which nothing can be merged; load the "
                    "adapter onto the unquantised base and merge there"
                )
    return model.merge_and_unload()


def _load_with_peft(model: nn.Module, source: LoraAdapter, adapter_name: str, is_trainable: bool) -> PeftModel:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(source.directory))
    renamings = source.renamings()
    if renamings:
        # PEFT goes by the names in the configuration, which are those of an older class.
        config.target_modules = list(source.updates)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        ranks = {name: source.rank(name) for name in source.updates}
        factors = {name: rank**0.5 if config.use_rslora else rank for name, rank in ranks.items()}
        config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        config.alpha_pattern = {f"^{re.escape(name)}": source.scaling(name) * factors[name] for name in ranks}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # `_check_loaded` raises
        return PeftModel.from_pretrained(
            model,
            str(source.directory),
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            key_mapping={rf"^{re.escape(old)}(?=\.|$)": new for old, new in renamings.items()} or None,
        )


def _fill_in(base: nn.Module, source: LoraAdapter) -> None:
    """Put in the trained projector of an original LLaVA adapter, of which PEFT does not know."""
    with torch.no_grad():
        for name in source.extra:
            base.get_parameter(name).copy_(source.replaced[name])


def _check_loaded(base: nn.Module, source: LoraAdapter, adapter_name: str) -> None:
    """Raise CheckpointError unless the model holds and scales every tensor of ``adapter_model.safetensors``."""
    for name in source.updates:
        layer = base.get_submodule(name)
        factors = _factors(layer, adapter_name)
        update = source.updates[name]
        for part, held, expected in zip("AB", factors, (update.a, update.b), strict=True):
            if held is None or not torch.equal(held.detach().cpu(), expected.to(held.dtype)):
                raise CheckpointError(
                    f"{source.directory}: after loading with PEFT, {name} does not hold the adapter's lora_{part}: it "
                    "would act as if it had not been loaded"
                )
        if abs(layer.scaling[adapter_name] - update.scaling) > 1e-6 * update.scaling:
            raise CheckpointError(
                f"{source.directory}: {name}: PEFT scales the update with {layer.scaling[adapter_name]}, "
                f"adapter_config.json with {update.scaling}"
            )
    for name in (name for name in source.replaced if name not in source.extra):
        held = _parameter(base, name, adapter_name)
        if held is None or not torch.equal(held.detach().cpu(), source.replaced[name].to(held.dtype)):
            raise CheckpointError(f"{source.directory}: after loading with PEFT, the model does not hold its {name}")


def _factors(layer: nn.Module, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
    """A and B in a LoRA layer, None where it is none or has no such adapter."""
    if adapter_name in getattr(layer, "lora_A", ()):
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if adapter_name in getattr(layer, "lora_embedding_A", ()):
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return None, None


def _parameter(base: nn.Module, name: str, adapter_name: str) -> Tensor | None:
    """The parameter that acts under a name of the plain model, seen through PEFT's wrappers."""
    module: Any = base
    for part in [*name.split("."), None]:
        if adapter_name in getattr(module, "modules_to_save", ()):
            module = module.modules_to_save[adapter_name]
        elif hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        if part is None:
            return module if isinstance(module, Tensor) else None
        module = getattr(module, part, None)
    return None


def _keep_gain(model: PeftModel) -> None:
    """Have the model's own methods, which do not know of the gain, keep it or refuse."""
    model.save_pretrained = functools.partial(_save_pretrained, model)
    tuner = model.base_model
    tuner.unload = functools.partial(_without_hooks, tuner, "unload")
    tuner.merge_and_unload = functools.partial(_without_hooks, tuner, "merge_and_unload")
    tuner.add_weighted_adapter = _refuse_weighted


def _without_hooks(tuner: nn.Module, method: str, *args: Any, **kwargs: Any) -> nn.Module:
    from hpa_ext.adapters.gain import detach_hooks

    plain = getattr(type(tuner), method)(tuner, *args, **kwargs)
    detach_hooks(plain)
    return plain


def _refuse_weighted(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "add_weighted_adapter: an adapter with a column gain cannot be averaged; compose_adapters adds steps"
    )


def _save_pretrained(model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's `save_pretrained`, and the gains beside each adapter that has them."""
    from hpa_ext.adapters.gain import gain_of, has_gain

    if not kwargs.get("safe_serialization", True) or (args and args[0] is False):
        raise ValueError("safe_serialization: expected True; a pickle cannot hold the mark of the gain")
    if kwargs.get("path_initial_model_for_weight_conversion"):
        raise ValueError("path_initial_model_for_weight_conversion: not possible with a column gain")
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
        layers = model.get_base_model().named_modules()
        gain = {name: gain_of(layer, adapter) for name, layer in layers if has_gain(layer, adapter)}
        if gain:
            directory = Path(save_directory) if adapter == "default" else Path(save_directory) / adapter
            mark_gain(directory, gain)
