"""The one factorisation that the compromise takes: ``H_t + mu H_s + nu H_e``, damped, in float32 where it suffices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import CompromiseGrams, mean_diagonal
from hpa_ext.errors import NumericalError
from hpa_ext.ops.cholesky import Cholesky, cholesky

# Measured over Grams of full and of low rank, strengths of 0.1 to 1e6 and dampings of 1e-5 to 0.01: the relative error
# of the changed update in float32 is at most 20 eps / (smallest squared pivot of the unit-diagonal matrix). Below this
# pivot it would exceed 1.2e-3, a third of what rounding to bfloat16 takes, and the matrix is factored in float64.
SMALLEST_FLOAT32_PIVOT = 1e-3

_DAMPING_STEP = 10.0
_LARGEST_DAMPING = 1.0
_FIRST_DAMPING_OF_NONE = 1e-4
_FIRST_PROTECTED_DAMPING = 1e-6  # covers the rounding of a float32 Gram, which a large strength multiplies

# Measured with undamped safety Grams of 12 tokens, a width of 64 and strengths of 1e3 to 1e8: float32, in which Grams
# are summed, makes an error of 2e-7 / (smallest squared pivot). Below this one it is as large as the update. A damping
# of 0.01, which is relative to the mean of the diagonal, keeps pivots above 0.01 / in_features.
_SMALLEST_PIVOT = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Factor:
    """``S = H_t' + mu H_s' + nu H_e'`` of damped Grams, factored.

    Attributes:
        strength: mu.
        cholesky: of S.
        task_damping, protected_damping: relative to the mean of the diagonal, as they were used; the second one for the
            safety set and the earlier tasks.
        rescued: whether more damping was needed than asked for.
    """

    strength: float
    cholesky: Cholesky
    task_damping: float
    protected_damping: float
    rescued: bool

    @property
    def precision_bits(self) -> int:
        """Of the factorisation, 32 or 64."""
        return 64 if self.cholesky.dtype == torch.float64 else 32

    def solve(self, rows: Tensor) -> Tensor:
        """``rows S^-1`` ``[k, in]`` in the dtype of the factor."""
        return self.cholesky.solve_rows(rows)


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
        if asked[1] == 0 < asked[0]:
            # Projection was asked for. As much damping as the task's, times a large strength, would undo the update.
            more = _FIRST_PROTECTED_DAMPING
            while more < asked[0]:
                dampings.append((asked[0], more))
                more *= _DAMPING_STEP
        more = max(used) * _DAMPING_STEP or _FIRST_DAMPING_OF_NONE
        while more <= _LARGEST_DAMPING:
            dampings.append((max(more, asked[0]), max(more, asked[1])))
            more *= _DAMPING_STEP
    for used in dampings:
        factor, minor, pivot = _attempt(grams, weights, used, torch.float64)
        if factor is not None and (pivot >= _SMALLEST_PIVOT or rescue == "precision" or used is dampings[-1]):
            if used == asked:
                return factor
            return replace(factor, rescued=True)
    raise NumericalError(
        f"gram.task + {strength:g} gram.safety{'' if grams.earlier is None else f' + {weights[1]:g} earlier'} is not "
        f"positive definite: leading minor {minor} fails with damping {used[0]:g} (rescue={rescue!r})",
        failing_minor=minor,
        damping=used[0],
    )


def dampings_of(config: CompromiseConfig) -> tuple[float, float]:
    """Of the task Gram and of the protected ones, as the settings ask for them."""
    return config.damping, config.damping if config.safety_damping is None else config.safety_damping


def _attempt(
    grams: CompromiseGrams, weights: tuple[float, float], dampings: tuple[float, float], dtype: torch.dtype
) -> tuple[Factor | None, int, float]:
    """The factor if there is one, the leading minor that failed (0 for none), and the smallest squared pivot."""
    if dtype == grams.dtype:
        total = torch.add(grams.task, grams.safety, alpha=weights[0])
    else:  # wider, without a wide copy of each
        total = grams.task.to(dtype).add_(grams.safety, alpha=weights[0])
    shift = dampings[0] * mean_diagonal(grams.task) + weights[0] * dampings[1] * mean_diagonal(grams.safety)
    if grams.earlier is not None and weights[1] > 0:
        total.add_(grams.earlier, alpha=weights[1])
        shift += weights[1] * dampings[1] * mean_diagonal(grams.earlier)
    diagonal = total.diagonal().double() + shift
    found = cholesky(total, diagonal)
    if found.failed_minor:
        return None, found.failed_minor, 0.0
    return Factor(weights[0], found, *dampings, rescued=False), 0, found.smallest_pivot
