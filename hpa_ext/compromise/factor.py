"""The one factorisation that the compromise takes: ``H_t + mu H_s + nu H_e``, damped, in float32 where it suffices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import CompromiseGrams, mean_diagonal
from hpa_ext.errors import NumericalError

# Measured over Grams of full and of low rank, strengths of 0.1 to 1e6 and dampings of 1e-5 to 0.01: the relative error
# of the changed update in float32 is at most 20 eps / (smallest squared pivot of the unit-diagonal matrix). Below this
# pivot it would exceed 1.2e-3, a third of what rounding to bfloat16 takes, and the matrix is factored in float64.
SMALLEST_FLOAT32_PIVOT = 1e-3

_DAMPING_STEP = 10.0
_LARGEST_DAMPING = 1.0
_FIRST_DAMPING_OF_NONE = 1e-4


@dataclass(frozen=True)
class Factor:
    """``S = H_t' + mu H_s' + nu H_e'`` of damped Grams as ``D^1/2 L L^T D^1/2``, with ``D = diag S``.

    Attributes:
        strength: mu.
        lower: L ``[in, in]``, float32 or float64.
        scaling: ``D^-1/2`` ``[in]``, of the dtype of L.
        task_damping, protected_damping: relative to the mean of the diagonal, as they were used; the second one for the
            safety set and the earlier tasks.
        rescued: whether more damping was needed than asked for.
    """

    strength: float
    lower: Tensor
    scaling: Tensor
    task_damping: float
    protected_damping: float
    rescued: bool

    @property
    def precision_bits(self) -> int:
        """Of the factorisation, 32 or 64."""
        return 64 if self.lower.dtype == torch.float64 else 32

    def solve(self, rows: Tensor) -> Tensor:
        """``rows S^-1`` ``[k, in]`` in the dtype of the factor."""
        scaled = rows.to(self.lower.dtype) * self.scaling
        return torch.cholesky_solve(scaled.mT, self.lower).mT * self.scaling


def factorize(grams: CompromiseGrams, strength: float, config: CompromiseConfig) -> Factor:
    """Factor ``H_t + mu H_s + nu H_e`` with each Gram damped by ``damping * mean diag(H) I``.

    Args:
        strength: mu, finite and at least 0.
        config: for nu, the dampings and the rescue.

    Raises:
        NumericalError: not positive definite even after the rescue; ``failing_minor`` is the order of the leading minor
            that is not positive, ``damping`` the last one that was tried.
    """
    rescue, asked = config.rescue, dampings_of(config)
    weights, used = (strength, config.earlier_strength), asked
    factor, minor, pivot = _attempt(grams, weights, used, grams.dtype)
    # With no rescue allowed a weak factor is taken as it is, as it was asked for.
    weak = minor == 0 and pivot < SMALLEST_FLOAT32_PIVOT and grams.dtype == torch.float32
    if factor is not None and (not weak or rescue == "none"):
        return factor
    dampings = [used] if rescue != "none" and grams.dtype != torch.float64 else []
    if rescue == "damping":
        more = max(used) * _DAMPING_STEP or _FIRST_DAMPING_OF_NONE
        while more <= _LARGEST_DAMPING:
            dampings.append((max(more, asked[0]), max(more, asked[1])))
            more *= _DAMPING_STEP
    for used in dampings:
        factor, minor, _ = _attempt(grams, weights, used, torch.float64)
        if factor is not None:
            if used == asked:
                return factor
            return Factor(strength, factor.lower, factor.scaling, *used, rescued=True)
    raise NumericalError(
        f"gram.task + {strength:g} gram.safety{'' if grams.earlier is None else f' + {weights[1]:g} earlier'} is not "
        f"positive definite: leading minor {minor} fails with damping {used[0]:g} (rescue={rescue!r})",
        failing_minor=minor,
        damping=used[0],
    )


def damped_product(rows: Tensor, matrix: Tensor, damping: float) -> Tensor:
    """``rows (H + damping mean(diag H) I)`` ``[k, in]``, without a copy of the matrix."""
    product = rows.to(matrix.dtype) @ matrix
    return product.add_(rows.to(matrix.dtype), alpha=damping * mean_diagonal(matrix)) if damping else product


def dampings_of(config: CompromiseConfig) -> tuple[float, float]:
    """Of the task Gram and of the protected ones, as the settings ask for them."""
    return config.damping, config.damping if config.safety_damping is None else config.safety_damping


def _attempt(
    grams: CompromiseGrams, weights: tuple[float, float], dampings: tuple[float, float], dtype: torch.dtype
) -> tuple[Factor | None, int, float]:
    """The factor if there is one, the leading minor that failed (0 for none), and the smallest squared pivot."""
    total = torch.add(grams.task.to(dtype), grams.safety.to(dtype), alpha=weights[0])
    shift = dampings[0] * mean_diagonal(grams.task) + weights[0] * dampings[1] * mean_diagonal(grams.safety)
    if grams.earlier is not None and weights[1] > 0:
        total.add_(grams.earlier.to(dtype), alpha=weights[1])
        shift += weights[1] * dampings[1] * mean_diagonal(grams.earlier)
    total.diagonal().add_(shift)
    diagonal = total.diagonal().clone()
    # A feature that nothing reached, without damping: left at 0, so that its minor is the one that fails.
    scaling = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    total.mul_(scaling).mul_(scaling[:, None])
    lower, info = torch.linalg.cholesky_ex(total)
    minor = int(info)
    pivot = float(lower.diagonal().square().min()) if minor == 0 else 0.0
    if minor == 0 and not pivot > 0:
        minor = int((~(lower.diagonal() > 0)).nonzero()[0]) + 1
    if minor:
        return None, minor, 0.0
    return Factor(weights[0], lower, scaling, *dampings, rescued=False), 0, pivot
