"""Model Tailor (Zhu et al., ICML 2024): keep a sparse patch of the tuned weights, and decorate it."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import LayerContext, inverse_factor, walk_columns
from .registry import post_training

_BLOCK_COLUMNS = 128
_SIGNS = {"obs": -1.0, "authors": 1.0, "none": 0.0}


@post_training(
    "model-tailor", "Model Tailor", "ICML 2024, OBS compensation", strength="density", grid=(0.05, 0.1, 0.3, 0.5)
)
@post_training(
    "model-tailor-authors",
    "Model Tailor, authors' sign",
    "ICML 2024, published code",
    settings={"compensation": "authors"},
    strength="density",
    grid=(0.05, 0.1, 0.3, 0.5),
)
@post_training(
    "model-tailor-none",
    "Model Tailor, no compensation",
    "ICML 2024, patch alone",
    settings={"compensation": "none"},
    strength="density",
    grid=(0.05, 0.1, 0.3, 0.5),
)
def model_tailor(
    old: Tensor,
    new: Tensor,
    layer: LayerContext,
    *,
    density: float = 0.1,
    omega: float = 0.8,
    compensation: str = "obs",
    damping: float = 0.01,
) -> Tensor:
    """The old weight with a patch of the new one ``[out, in]``, in new's dtype.

    Args:
        old, new: weights before and after tuning.
        layer: its task Gram counts.
        density: share of the layer's weights that stay tuned, in [0, 1].
        omega: weight of the size of the update against the loss of its removal.
        compensation: what later columns do when one returns to its old value: "obs" makes up for it; "authors" has the
            sign of the published code, which adds to it; "none".
        damping: of H, relative to the mean of its diagonal.

    ``S = omega z(|d|) + (1 - omega) z(W_new^2 / U_jj^2)``, z-scored in each row within blocks of 128 columns.
    """
    if compensation not in _SIGNS:
        raise ValueError(f"compensation: expected one of {', '.join(_SIGNS)}, got {compensation!r}")
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected a share in [0, 1], got {density}")
    factor = inverse_factor(layer.task, damping)
    before, current = old.double(), new.double().clone()
    loss = current.square() / factor.diagonal().square()
    score = omega * _standardized((current - before).abs()) + (1 - omega) * _standardized(loss)
    kept = torch.zeros(score.numel(), dtype=torch.bool, device=new.device)
    kept[score.flatten().argsort(descending=True, stable=True)[: int(density * score.numel() + 0.5)]] = True
    kept = kept.view_as(score)
    walk_columns(current, before, ~kept, factor, sign=_SIGNS[compensation])
    return current.to(new.dtype)


def _standardized(values: Tensor) -> Tensor:
    """Zero mean and unit (population) deviation in each row of each block of columns; constant rows become zero."""
    parts = []
    for block in values.split(_BLOCK_COLUMNS, dim=1):
        deviation = block.std(1, correction=0, keepdim=True)
        scaled = (block - block.mean(1, keepdim=True)) / torch.where(deviation > 0, deviation, 1.0)
        parts.append(torch.where(deviation > 0, scaled, 0.0))
    return torch.cat(parts, 1)
