"""In and out of a layer that LoRA may tune, whichever kind it is and however its weight is stored or quantised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hpa_ext.models.structure import is_conv1d


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a linear map; ``transposed``: the weight is stored as ``[in, out]``."""

    in_features: int
    out_features: int
    transposed: bool = False


def layer_sizes(module: nn.Module) -> LayerSizes | None:
    """The sizes of a linear layer, a Conv1D or an embedding (tokens to width), None for anything else.

    Quantised linear layers are known by their ``in_features`` and ``out_features``, which all kinds have.
    """
    if isinstance(module, nn.Embedding):
        return LayerSizes(module.num_embeddings, module.embedding_dim, True)
    if is_conv1d(module):
        return LayerSizes(module.nx, module.nf, True)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in sizes) and not isinstance(module, nn.Bilinear):
        return LayerSizes(*sizes)
    return None
