"""Seconds for counted work: an overhead per call, a bandwidth and an arithmetic rate, fitted to measured samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpa_ext.costs.work import Work


@dataclass(frozen=True)
class Rates:
    """``seconds = calls * per_call + bytes * per_byte + operations * per_operation``.

    The sum, and not the largest of the three, because the phases of an operation follow each other: packing, then
    products. So a rate that grows with the size, as that of a factorisation does, is the sum of a cubic and a quadratic
    term, and goes on to wider matrices than those that were measured.

    Attributes:
        per_call, per_byte, per_operation: seconds, at least 0.
    """

    per_call: float
    per_byte: float
    per_operation: float

    def seconds(self, work: Work) -> float:
        """The time of that much work."""
        return work.calls * self.per_call + work.bytes * self.per_byte + work.operations * self.per_operation

    @classmethod
    def fit(cls, samples: Sequence[tuple[Work, float]]) -> Rates:
        """The rates, none of them negative, with the least squared relative error over samples of work and seconds.

        Raises:
            ValueError: no sample, or one that took no time or is no work.
        """
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        rows = []
        for work, seconds in samples:
            if not 0 < seconds < math.inf or max(work.calls, work.bytes, work.operations) <= 0:
                raise ValueError(f"samples: expected work that took time, got {work} in {seconds!r} s")
            rows.append([value / seconds for value in (work.calls, work.bytes, work.operations)])
        matrix = torch.tensor(rows, dtype=torch.float64)
        scale = matrix.amax(0)
        used = [column for column in range(3) if scale[column] > 0]
        best, found = math.inf, (0.0, 0.0, 0.0)
        # Three coefficients: the best of all sets of them that come out positive is the constrained optimum.
        for size in range(1, min(len(used), len(rows)) + 1):
            for columns in itertools.combinations(used, size):
                part = matrix[:, columns] / scale[list(columns)]
                solution = torch.linalg.lstsq(part, torch.ones(len(rows), dtype=torch.float64), driver="gelsd").solution
                error = float((part @ solution - 1).square().sum())
                if bool((solution >= 0).all()) and error < best - 1e-12:
                    best = error
                    values = dict(zip(columns, (solution / scale[list(columns)]).tolist(), strict=True))
                    found = tuple(values.get(column, 0.0) for column in range(3))
        return cls(*found)
