"""Task arithmetic (Ilharco et al., ICLR 2023) and WiSE-FT (Wortsman et al., CVPR 2022).

For one update both are the same line between two points, and for a sequence in which each step starts from the result
of the one before they would be the same too. Here they differ as their sources do: task arithmetic adds task vectors
that were all tuned from the initial weight, WiSE-FT goes part of the way at each step.
"""

from __future__ import annotations

from torch import Tensor

from .layer import LayerContext
from .registry import post_training


@post_training(
    "task-arithmetic", "Task arithmetic", "ICLR 2023", strength="scale", grid=(0.2, 0.4, 0.6, 0.8), needs=("history",)
)
def task_arithmetic(old: Tensor, new: Tensor, layer: LayerContext, *, scale: float = 0.4) -> Tensor:
    """``W_initial + scale sum_t (W_new,t - W_initial)`` over all steps so far ``[out, in]``; scale is at least 0."""
    if not scale >= 0:
        raise ValueError(f"scale: expected at least 0, got {scale}")
    start = old if layer.initial is None else layer.initial
    total = (new - old).double()
    for update in layer.earlier_updates:
        total = total + update.double()
    return (start.double() + scale * total).to(new.dtype)


@post_training("wise-ft", "WiSE-FT", "CVPR 2022", strength="share", grid=(0.2, 0.4, 0.6, 0.8))
def wise_ft(old: Tensor, new: Tensor, layer: LayerContext, *, share: float = 0.5) -> Tensor:
    """``(1 - share) W_old + share W_new`` ``[out, in]``; share in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    return ((1 - share) * old.double() + share * new.double()).to(new.dtype)
