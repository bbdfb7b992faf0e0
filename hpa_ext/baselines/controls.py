"""Controls for HPA: the same number of columns retained, chosen without any Gram. Not methods of anybody's.

If HPA is no better than these, then what it gains comes from retaining columns at all, not from which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.hpa.config import HPAConfig, column_count

from .layer import LayerContext
from .registry import post_training


@post_training("retain-largest", "columns of the largest update", "control for HPA", group="control")
@post_training("retain-random", "random columns", "control for HPA", settings={"choice": "random"}, group="control")
def retain_columns(old: Tensor, new: Tensor, layer: LayerContext, *, choice: str = "largest") -> Tensor:
    """New with as many columns of old as HPA retains, and HPA's orthogonal adjustment, ``[out, in]``.

    ``choice``: "largest" retains the columns of the largest ``sum_i D_ij^2``, "random" draws them by the layer's seed.
    """
    if choice not in ("largest", "random"):
        raise ValueError(f"choice: expected 'largest' or 'random', got {choice!r}")
    before, update = old.double(), (new - old).double()
    count = column_count(HPAConfig().retain_percent(layer.depth), new.shape[1])
    if choice == "largest":
        columns = update.square().sum(0).argsort(descending=True, stable=True)[:count]
    else:
        columns = torch.randperm(new.shape[1], generator=layer.generator())[:count].to(new.device)
    norm = before.square().sum()
    coefficient = (update * before).sum() / norm if norm > 0 else 0.0
    result = before + update - coefficient * before
    result[:, columns] = before[:, columns]
    return result.to(new.dtype)
