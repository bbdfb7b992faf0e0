"""What a tuning step did to one weight, seen through the sums that HPA asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError

_ROWS_AT_A_TIME = 1024


class WeightUpdate(Protocol):
    """An old weight ``[out, in]`` and its update ``D``, however they are stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the whole weight."""

    @property
    def device(self) -> torch.device:
        """Where the sums are computed."""

    def column_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """``sum_i D_ij^2`` ``[in]``, ``<D, W_old>`` and ``||W_old||^2``, float32 (float64 for float64 weights)."""

    def row_sums(self, column_weights: list[Tensor]) -> list[Tensor]:
        """``sum_j D_ij^2 w_j`` ``[out]`` for each ``w`` ``[in]``."""

    def raise_not_finite(self) -> None:
        """Raise a NumericalError that names what holds NaN or Inf."""

    def backend(self) -> dict[str, str]:
        """Which backend serves the operations on these weights."""


@dataclass(frozen=True)
class DenseUpdate:
    """Both weights as they are, ``[out, in]``, alike in dtype and device."""

    old: Tensor
    new: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return tuple(self.old.shape)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.old.device

    def column_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `WeightUpdate`: one pass over both weights."""
        return ops.column_scores(self.old, self.new)

    def row_sums(self, column_weights: list[Tensor]) -> list[Tensor]:
        """See `WeightUpdate`: some rows at a time, so that no copy of the weight is made."""
        parts: list[list[Tensor]] = [[] for _ in column_weights]
        for start in range(0, self.old.shape[0], _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            dtype = column_weights[0].dtype
            squares = (self.new[rows].to(dtype) - self.old[rows].to(dtype)).square_()
            for part, weight in zip(parts, column_weights, strict=True):
                part.append((squares * weight).sum(1))
        return [
            torch.cat(part) if part else weight.new_zeros(0) for part, weight in zip(parts, column_weights, strict=True)
        ]

    def raise_not_finite(self) -> None:
        """See `WeightUpdate`."""
        for name, weight in (("layer_old", self.old), ("layer_new", self.new)):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise NumericalError(f"{name}: the weight {list(weight.shape)} holds {bad} NaN or Inf")
        raise NumericalError("the weights are too large: their squares overflow float32")

    def backend(self) -> dict[str, str]:
        """See `WeightUpdate`."""
        return {name: ops.backend_of(name, self.old) for name in ("column_scores", "project_merge")}
