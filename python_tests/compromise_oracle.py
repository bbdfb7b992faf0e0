"""The compromise by least squares on the activations themselves, in float64: no Gram, no Cholesky, no closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext import Gram


def activations(count: int, width: int, seed: int, *, rank: int | None = None, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated float32 rows ``[count, width]`` with features of unlike size, of some rank, some features zero."""
    generator = torch.Generator().manual_seed(seed)
    rank = width if rank is None else rank
    mixing = torch.randn(rank, width, generator=generator) / rank**0.5
    x = torch.randn(count, rank, generator=generator) @ mixing
    x *= torch.logspace(-1, 1, width)
    x[:, list(dead)] = 0
    return x


def gram(x: Tensor) -> Gram:
    return Gram(x.shape[1]).update(x)


def least_squares(
    update: Tensor,
    safety: Tensor,
    task: Tensor,
    strength: float,
    damping: float = 0.01,
    *,
    earlier: Sequence[Tensor] = (),
    earlier_strength: float = 0.0,
) -> Tensor:
    """``argmin_X E_t |(X - D) x|^2 + mu E_s |X x|^2 + nu sum_e E_e |X x|^2``, each set damped, stacked ``[n, in]``."""
    update = update.double()
    blocks, targets = [], []
    zero = torch.zeros_like(update)
    terms = [(task, 1.0, update), (safety, strength, zero), *((x, earlier_strength, zero) for x in earlier)]
    for x, weight, target in terms:
        rows = x.double() * (2 * weight / len(x)) ** 0.5
        ridge = (weight * damping * 2 * x.double().square().sum(0).mean() / len(x)) ** 0.5
        for block in (rows, ridge * torch.eye(x.shape[1], dtype=torch.float64)):
            blocks.append(block)
            targets.append(block @ target.mT)
    return torch.linalg.lstsq(torch.cat(blocks), torch.cat(targets), driver="gelsd").solution.mT


def change(x: Tensor, update: Tensor) -> float:
    """``mean |update x|^2`` over the rows of x, times two as the Gram has it."""
    return float((x.double() @ update.double().mT).square().sum() * 2 / len(x))
