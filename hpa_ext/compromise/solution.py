"""The compromise for one linear: tensors in, tensors out.

``min_X tr((X - D) H_t (X - D)^T) + mu tr(X H_s X^T) + nu tr(X H_e X^T)`` over updates X of ``W_old`` has the solution
``X = D H_t (H_t + mu H_s + nu H_e)^-1`` (RegMean's form; Jin et al., ICLR 2023), D being what tuning added and H_e the
sum of earlier tasks' Grams; all Grams damped. It multiplies D from the right, so of a LoRA update ``D = s B A`` it
changes A alone, ``A H_t (H_t + mu H_s + nu H_e)^-1``, of the same rank. A budget bounds the second trace and mu is its
multiplier, so that no other update within it has a smaller sum of the other two (but for the damping, which the budget
leaves out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.factor import Factor, factorize
from hpa_ext.compromise.grams import CompromiseGrams, mean_diagonal
from hpa_ext.compromise.strength import find_strength
from hpa_ext.errors import NumericalError
from hpa_ext.precision import without_autocast

# Grams are summed in float32: of an update that the samples do not see at all up to 2.4 eps of `uncorrelated_energy`
# were measured (widths of 64 to 1024, 8 to 300 tokens, means of 0 to 5). What is below this is no change of outputs.
_UNSEEN = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class UpdateRows:
    """What the solution multiplies from the right, and how its rows make up the update.

    Attributes:
        rows: ``[k, in]``: the update itself, or A of a LoRA.
        metric: ``[k, k]`` float64, ``s^2 B^T B`` of a LoRA, so that a change of outputs is ``tr(metric X H X^T)``;
            None for the identity.
    """

    rows: Tensor
    metric: Tensor | None = None

    @classmethod
    def of_lora(cls, a: Tensor, b: Tensor, scaling: float) -> UpdateRows:
        """Of ``scaling * b @ a`` with a ``[r, in]`` and b ``[out, r]``."""
        wide = b.double() * scaling
        return cls(a, wide.mT @ wide)

    def energy(self, rows: Tensor, product: Tensor) -> float:
        """``tr(metric X H X^T)`` of X ``[k, in]`` and X H: the mean squared change of outputs, twice as H has it."""
        if self.metric is None:
            return max(float((product * rows).sum(dtype=torch.float64)), 0.0)
        return max(float(((product.double() @ rows.double().mT) * self.metric).sum()), 0.0)

    def uncorrelated_energy(self, gram: Tensor) -> float:
        """The energy of these rows if no two features were correlated: what rounding in `energy` is measured by."""
        scaled = self.rows.double() * gram.diagonal().double().clamp_min(0).sqrt()
        if self.metric is None:
            return float(scaled.square().sum())
        return max(float(((scaled @ scaled.mT) * self.metric).sum()), 0.0)

    def norm(self, rows: Tensor) -> float:
        """The Frobenius norm of the update that these rows make up."""
        if self.metric is None:
            return float(torch.linalg.vector_norm(rows))
        rows = rows.double()
        return max(float(((rows @ rows.mT) * self.metric).sum()), 0.0) ** 0.5

    def compressed(self) -> UpdateRows:
        """An update of the same energies in fewer rows, where there are many more rows than columns."""
        if self.metric is not None or self.rows.shape[0] <= 2 * self.rows.shape[1]:
            return self
        return UpdateRows(torch.linalg.qr(self.rows, mode="r").R)


@dataclass(frozen=True)
class Solution:
    """The compromise of one update, and what it keeps.

    Attributes:
        rows: ``[k, in]``, in place of `UpdateRows.rows`; that very tensor if nothing changed.
        strength: mu; infinite for a budget of 0.
        safety_left: ``tr(X H_s X^T) / tr(D H_s D^T)``, what a budget bounds; None if tuning changed no output there.
        earlier_left: the same with H_e; None without earlier tasks, too.
        task_lost: ``tr((X - D) H_t (X - D)^T) / tr(D H_t D^T)``; None if tuning changed no output there.
        norms: Frobenius norms of the update before and after.
        evaluations: how many strengths were tried, each one factorisation unless the last update had the same strength.
        factor: the one that was used; None if none was.
    """

    rows: Tensor
    strength: float
    safety_left: float | None
    earlier_left: float | None
    task_lost: float | None
    norms: tuple[float, float]
    evaluations: int
    factor: Factor | None


@dataclass
class Compromise:
    """Solves for updates of linears that share an input: the last factor is kept, for q, k and v at one strength.

    Attributes:
        grams: of the input.
        config: settings.
        factorizations: how many were made so far.
    """

    grams: CompromiseGrams
    config: CompromiseConfig
    factorizations: int = 0
    _factor: Factor | None = field(default=None, repr=False)

    def solve(self, update: UpdateRows, start: float | None = None) -> Solution:
        """The compromise for one update.

        Args:
            update: on the device of the Grams; finite.
            start: strength to begin the search for a budget with. None: where both sides weigh alike, so that the
                result does not depend on what was solved before.

        Raises:
            NumericalError: the sum of the Grams cannot be factored; no strength holds the budget; the energies
                overflow.

        All shares are those of the Grams without damping, before the result is rounded to the weights' dtype.
        """
        with without_autocast(update.rows):
            return self._solve(UpdateRows(update.rows.to(self.grams.dtype), update.metric), update.rows, start)

    def _solve(self, update: UpdateRows, given: Tensor, start: float | None) -> Solution:
        products = self._products(update.rows)
        whole = {name: update.energy(update.rows, product) for name, product in products.items()}
        if not all(math.isfinite(value) for value in whole.values()):
            raise NumericalError(f"the update is too large for these Grams: its outputs overflow {self.grams.dtype}")
        for name, gram in self._sides().items():
            if whole[name] <= _UNSEEN * update.uncorrelated_energy(gram):
                whole[name] = 0.0
        strength, evaluations, changed = self._strength(update, products, whole["safety"], start)
        rows, used = changed, None
        if (strength == 0 and not self._earlier_counts) or not bool(update.rows.any()):
            rows, changed, evaluations = given, update.rows, 0
        elif math.isinf(strength):
            rows = changed = torch.zeros_like(update.rows)
        else:
            rows = changed = self._rows(update.rows, products, strength) if changed is None else changed
            used = self._factor
        del products

        def share(name: str, difference: Tensor) -> float | None:
            if not whole.get(name):
                return None
            return update.energy(difference, difference @ self._sides()[name]) / whole[name]

        return Solution(
            rows=rows,
            strength=strength,
            safety_left=share("safety", changed),
            earlier_left=share("earlier", changed),
            task_lost=share("task", update.rows - changed),
            norms=(update.norm(update.rows), update.norm(changed)),
            evaluations=evaluations,
            factor=used,
        )

    def _sides(self) -> dict[str, Tensor]:
        """The Grams that there are, by name."""
        sides = {"safety": self.grams.safety, "task": self.grams.task, "earlier": self.grams.earlier}
        return {name: gram for name, gram in sides.items() if gram is not None}

    def _products(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows times each Gram, which all strengths have in common."""
        return {name: rows @ gram for name, gram in self._sides().items()}

    @property
    def _earlier_counts(self) -> bool:
        """Whether earlier tasks have a part in the solution."""
        return self.grams.earlier is not None and self.config.earlier_strength > 0

    def _strength(
        self, update: UpdateRows, products: dict[str, Tensor], whole: float, start: float | None
    ) -> tuple[float, int, Tensor | None]:
        """The strength in force, how many were tried, and the rows at it if they are known by then."""
        config = self.config
        if config.strength is not None:
            return float(config.strength), 1, None
        if whole == 0 or config.budget >= 1:
            return 0.0, 0, None  # nothing that the safety samples see has changed, or all of it may
        if config.budget == 0:
            return math.inf, 0, None
        small = update.compressed()
        if small is not update:
            products = self._products(small.rows)
        scale = self.grams.scale()
        start = scale if start is None else start
        tried: dict[float, float] = {}
        rows = None

        def share(strength: float) -> float:
            nonlocal rows
            if strength not in tried:
                rows = None  # before the next ones are made
                rows = self._rows(small.rows, products, strength)
                tried[strength] = small.energy(rows, rows @ self.grams.safety) / whole
            return tried[strength]

        def at(found: float) -> tuple[float, int, Tensor | None]:
            return found, len(tried), rows if small is update and list(tried)[-1] == found else None

        # What protects the earlier tasks may have held the budget already.
        if self._earlier_counts and share(start) <= config.budget and share(0.0) <= config.budget:
            return at(0.0)
        return at(find_strength(share, config.budget, start, config.tolerance, scale))

    def _rows(self, rows: Tensor, products: dict[str, Tensor], strength: float) -> Tensor:
        """``X = D H_t S^-1``, or the same as ``D - D (mu H_s + nu H_e) S^-1``: what corrects less rounds less."""
        factor, weights = self._factor_at(strength), {"safety": strength}
        if self._earlier_counts:
            weights["earlier"] = self.config.earlier_strength
        means = {name: mean_diagonal(gram) for name, gram in self._sides().items()}
        if sum(weight * means[name] for name, weight in weights.items()) > means["task"]:
            damped = torch.add(products["task"], rows, alpha=factor.task_damping * means["task"])
            return factor.solve(damped).to(rows.dtype)
        removed = torch.zeros_like(rows)
        for name, weight in weights.items():
            removed.add_(products[name], alpha=weight)
            removed.add_(rows, alpha=weight * factor.protected_damping * means[name])
        return rows - factor.solve(removed).to(rows.dtype)

    def _factor_at(self, strength: float) -> Factor:
        if self._factor is None or self._factor.strength != strength:
            self._factor = None  # before the next one is made: there is never more than one
            self._factor = factorize(self.grams, strength, self.config)
            self.factorizations += 1
        return self._factor
