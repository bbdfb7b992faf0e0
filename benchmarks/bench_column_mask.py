"""column_mask: ours against topk and scatter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row

_PERCENT = 10


def topk_mask(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores of each row. Which of equal scores it takes is torch's affair."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


def exact_mask(scores: Tensor, count: int) -> Tensor:
    """The same by a stable sort in float64, which takes the lower index first."""
    order = torch.sort(scores.double(), dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def rows(setting: Setting) -> Iterator[Row]:
    """``column_mask_vs_topk``: the scores of one layer, and of all layers of one shape at once."""
    for batch, columns in setting.cases([(3, 64)], [(1, 4096), (128, 4096)], [(32, 11008)]):
        count = columns * _PERCENT // 100
        shape = (batch, columns)
        sets = setting.sets(batch * columns * 5, lambda shape=shape: (setting.randn(*shape).abs(),))
        (scores,) = sets[0]
        exact = exact_mask(scores, count)
        check = Check(
            error=float((ops.column_mask(scores, count) ^ exact).float().mean()),
            limit=0.0,
            peer_error=float((topk_mask(scores, count) ^ exact).float().mean()),
        )
        paired = setting.pair(
            lambda index, sets=sets, count=count: ops.column_mask(*sets[index % len(sets)], count),
            lambda index, sets=sets, count=count: topk_mask(*sets[index % len(sets)], count),
        )
        yield make_row(
            "column_mask_vs_topk", "rows, columns", shape, scores.dtype, "topk, scatter",
            paired, setting.traffic(batch * columns * 5), check, ops.backend_of("column_mask", scores),
        )  # fmt: skip
