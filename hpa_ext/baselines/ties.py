"""TIES-Merging (Yadav et al., NeurIPS 2023): trim the task vectors, elect signs, take the mean of those that agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import LayerContext
from .registry import post_training


@post_training("ties", "TIES", "NeurIPS 2023", strength="scale", grid=(0.5, 1.0, 1.5, 2.0), needs=("history",))
def ties(old: Tensor, new: Tensor, layer: LayerContext, *, scale: float = 1.0, density: float = 0.2) -> Tensor:
    """``W_initial + scale TIES(updates of all steps so far)`` ``[out, in]``, in new's dtype.

    Args:
        old, new: weights before and after tuning; their difference is the last task vector.
        layer: ``initial`` and ``earlier_updates`` count.
        scale: of the merged task vector, at least 0.
        density: share of each task vector that is kept, the largest by magnitude, in [0, 1].
    """
    if not scale >= 0:
        raise ValueError(f"scale: expected at least 0, got {scale}")
    start = old if layer.initial is None else layer.initial
    updates = torch.stack([update.double() for update in (*layer.earlier_updates, new - old)])
    return (start.double() + scale * merge_task_vectors(updates, density)).to(new.dtype)


def merge_task_vectors(updates: Tensor, density: float) -> Tensor:
    """Trim, elect and merge task vectors ``[tasks, out, in]`` into ``[out, in]``."""
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected a share in [0, 1], got {density}")
    flat = updates.flatten(1)
    count = int(density * flat.shape[1] + 0.5)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept.scatter_(1, flat.abs().argsort(dim=1, descending=True, stable=True)[:, :count], True)
    trimmed = torch.where(kept, flat, 0.0).view_as(updates)
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    return torch.where(agrees, trimmed, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
