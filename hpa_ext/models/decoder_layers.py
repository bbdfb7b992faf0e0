"""The list of a decoder's layers: what can be run one after the other."""

from __future__ import annotations

from torch import nn

from hpa_ext.models.structure import decoder_name, unwrap


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: the one ``nn.ModuleList`` right below the decoder.

    ``model.language_model.layers`` for LLaVA, ``model.layers`` for Llama-like models, ``transformer.h`` for GPT-2.

    Raises:
        ValueError: there is none, or more than one.
    """
    plain = unwrap(model)
    parent = decoder_name(plain)
    decoder = plain.get_submodule(parent)
    found = [
        (f"{parent}.{name}" if parent else name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"expected one list of layers in the decoder of {type(plain).__name__}, found {names}")
    return found[0]
