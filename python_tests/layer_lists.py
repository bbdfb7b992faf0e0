"""Lists of layers as the grouped operations take them: mixed shapes and dtypes, empty ones, views."""

from __future__ import annotations

import torch
from helpers import lay_out, normal
from torch import Tensor

SHAPES = [(7, 5), (130, 65), (0, 3), (3, 0), (64, 64), (33, 264), (1, 1), (2, 1030)]
MIXED = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16, torch.float16]


def weight_pairs(
    device: torch.device, shapes: list[tuple[int, int]] = SHAPES, dtypes: list[torch.dtype] = MIXED
) -> tuple[list[Tensor], list[Tensor]]:
    """For each shape a weight, and the same after an update; the dtypes take turns."""
    old = [normal(*shape, dtype=dtypes[i % len(dtypes)], device=device) for i, shape in enumerate(shapes)]
    return old, [w + 0.1 * normal(*w.shape, dtype=w.dtype, device=device) for w in old]


def laid_out(weights: list[Tensor]) -> list[Tensor]:
    """Every layer in another memory layout."""
    layouts = ["transposed", "padded_rows", "contiguous", "every_other_column", "offset", "sliced_columns"]
    return [lay_out(w, layouts[i % len(layouts)]) for i, w in enumerate(weights)]


def masks_of(weights: list[Tensor], axis: str = "input") -> list[Tensor]:
    """A random mask for each layer."""
    return [(torch.rand(w.shape[1 if axis == "input" else 0]) < 0.4).to(w.device) for w in weights]
