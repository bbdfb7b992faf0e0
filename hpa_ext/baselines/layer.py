"""What a post-training method is given beside the two weights of a layer, and what several methods compute from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram


@dataclass
class LayerContext:
    """A layer within a sequence of tuning steps.

    Attributes:
        name: the module's name.
        depth: layer / number of layers, 1-based, in [0, 1].
        safety, task: Grams of the layer's input: of the safety set through the old model, of the task set through the
            new one. Each a `Gram` or its matrix ``H = 2/n sum x^T x`` ``[in, in]``.
        initial: the weight before the first step of the sequence ``[out, in]``.
        earlier_updates: what tuning added at each earlier step, ``[out, in]`` each, oldest first.
        alignment: aligned minus unaligned weight ``[out, in]``; None where nobody has the unaligned model.
        earlier: the sum of the task Grams of all earlier steps ``[in, in]``, as far as they were kept; None at the
            first step, and for a method that does not want it.
        seed: for methods that draw, different for each step; the same for a rerun.
        records: a method may append what it wants reported (HPA's `LayerReport`).
    """

    name: str
    depth: float
    safety: Gram | Tensor
    task: Gram | Tensor
    initial: Tensor | None = None
    earlier_updates: tuple[Tensor, ...] = ()
    alignment: Tensor | None = None
    earlier: Tensor | None = None
    seed: int = 0
    records: list[Any] = field(default_factory=list)

    def generator(self) -> torch.Generator:
        """A generator on the CPU, of this step and layer alone."""
        generator = torch.Generator()
        digest = sum((number + 1) * byte for number, byte in enumerate(self.name.encode()))
        return generator.manual_seed((self.seed * 1_000_003 + digest) % 2**63)


def damped(gram: Gram | Tensor, damping: float) -> Tensor:
    """``H + damping mean(diag H) I`` ``[in, in]`` in float64; ValueError for a negative damping."""
    if damping < 0:
        raise ValueError(f"damping: expected at least 0, got {damping}")
    matrix = (gram.matrix() if isinstance(gram, Gram) else gram).double().clone()
    matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return matrix


def inverse(gram: Gram | Tensor, damping: float) -> Tensor:
    """The inverse ``[in, in]`` float64 of the damped Gram. NumericalError if it is not positive definite."""
    return torch.cholesky_inverse(_cholesky(damped(gram, damping)))


def inverse_factor(gram: Gram | Tensor, damping: float) -> Tensor:
    """``U`` ``[in, in]`` float64, upper, with ``H^-1 = U^T U``: the factor that SparseGPT's family walks along."""
    return _cholesky(inverse(gram, damping)).mT.contiguous()


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise NumericalError("the damped Gram is not positive definite; raise the damping", failing_minor=int(info))
    return factor


def walk_columns(
    current: Tensor, targets: Tensor, fixed: Tensor, factor: Tensor, sign: float = -1.0, group: int = 1
) -> Tensor:
    """Set weights column by column and let later columns make up for the change in the layer's output (OBS).

    Args:
        current: the weights to start from ``[out, in]`` float64; changed in place.
        targets: the value of a weight that is set ``[out, in]``.
        fixed: bool ``[out, in]``, the weights that are set to their target; the others keep what earlier columns have
            made of them.
        factor: ``U`` of `inverse_factor`.
        sign: -1 makes up for the change (OBS), +1 does the opposite, 0 nothing.
        group: columns that are set at once, none making up for another of them.

    Returns:
        ``err_j = (w_j - q_j) / U_jj`` ``[out, in]``, by which later columns moved: ``w_k += sign err_j U_jk``.
    """
    errors = torch.zeros_like(current)
    diagonal = factor.diagonal()
    for start in range(0, current.shape[1], group):
        part = slice(start, min(start + group, current.shape[1]))
        value = torch.where(fixed[:, part], targets[:, part], current[:, part])
        errors[:, part] = (current[:, part] - value) / diagonal[part]
        current[:, part] = value
        if sign and part.stop < current.shape[1]:
            current[:, part.stop :] += sign * (errors[:, part] @ factor[part, part.stop :])
    return errors
