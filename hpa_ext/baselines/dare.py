"""DARE (Yu et al., ICML 2024): drop entries of the update at random, and rescale the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import LayerContext
from .registry import post_training


@post_training("dare", "DARE", "ICML 2024", strength="drop", grid=(0.2, 0.5, 0.8, 0.9))
def dare(old: Tensor, new: Tensor, layer: LayerContext, *, drop: float = 0.9) -> Tensor:
    """``W_old + keep * (W_new - W_old) / (1 - drop)`` ``[out, in]``, keep ~ Bernoulli(1 - drop), drop in [0, 1).

    Drawn from ``layer.generator()``: the same for the same seed, step and layer.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: expected a probability in [0, 1), got {drop}")
    keep = torch.rand(new.shape, generator=layer.generator(), dtype=torch.float64).to(new.device) >= drop
    return (old.double() + keep * (new - old).double() / (1 - drop)).to(new.dtype)
