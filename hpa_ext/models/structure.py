"""Where a transformers model keeps its decoder: the facts that pipelines ask for instead of knowing names."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, DistributedDataParallel or torch.compile, or the model itself."""
    model = without_data_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_data_parallel(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, or the module itself."""
    model = uncompiled(model)
    return uncompiled(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def decoder_name(model: nn.Module) -> str:
    """Name of the language model's decoder inside `model` ("" if it is the model itself).

    ``model.language_model`` for LLaVA and its kin, ``model`` for Llama-like and ``transformer`` for GPT-2-like causal
    language models. For a model that transformers does not know, "" means that all of it is the decoder.
    """
    if not hasattr(model, "get_decoder"):
        return ""
    decoder = model.get_decoder()
    # BLIP-2 names a whole causal language model, output head included.
    while hasattr(decoder, "get_decoder") and decoder.get_output_embeddings() is not None:
        inner = decoder.get_decoder()
        if inner is None or inner is decoder:
            break
        decoder = inner
    for name, module in model.named_modules():
        if module is decoder:
            return name
    return ""


def in_module(name: str, parent: str) -> bool:
    """Whether the module called `name` is `parent` or inside it."""
    return parent == "" or name == parent or name.startswith(parent + ".")


def layer_depth(model: nn.Module, name: str) -> float:
    """``layer / layers``, 1-based, from the outermost numbered list of modules that holds `name`; 1.0 outside of any.

    A linear after the last decoder layer, such as the output head, is as deep as the last layer.
    """
    module: Any = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return (int(part) + 1) / len(module)
        module = getattr(module, part)
    return 1.0


def is_conv1d(module: object) -> bool:
    """Whether the module is transformers' Conv1D, whose weight is ``[in, out]``; by name, to import nothing."""
    # FSDP2 derives a class of its own from that of a module that it shards.
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def image_token_id(model: nn.Module) -> int | None:
    """The id of the placeholder token that stands for image features, None for a model without images."""
    config = getattr(model, "config", None)
    for key in ("image_token_id", "image_token_index"):
        value = getattr(config, key, None)
        if value is not None:
            return int(value)
    return None
