"""HPA on a LoRA update without forming the new weight: everything comes from ``W_old``, A and B.

Equations: ``sum_i D_ij^2 = s^2 diag(A^T (B^T B) A)_j``, ``<D, W_old> = s <B, W_old A^T>``, and the result is
``W_old diag(g) + s B (A * (1 - m))`` with the column gain ``g = 1 - c (1 - m)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.hpa.selection import Selection
from hpa_ext.ops._checks import describe

# Small enough for the rows in float32 to stay in a core's cache, large enough to feed a matrix product.
_ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class LowRankUpdate:
    """The update ``D = scaling * b @ a`` of a weight.

    Attributes:
        old: ``[out, in]`` bfloat16, float16, float32 or float64.
        a: ``[r, in]``; b: ``[out, r]``; any floating dtype, on the device of `old`.
        scaling: what PEFT multiplies ``B A`` with.
    """

    old: Tensor
    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        for name, tensor in (("old", self.old), ("a", self.a), ("b", self.b)):
            if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.dtype.is_floating_point:
                raise ValueError(f"{name}: expected a floating-point matrix, got {describe(tensor)}")
            if tensor.device != self.old.device:
                raise ValueError(f"{name}: expected device {self.old.device} like old, got {tensor.device}")
        out_features, in_features = self.old.shape
        if self.a.shape[1] != in_features or self.b.shape != (out_features, self.a.shape[0]):
            raise ValueError(
                f"a, b: expected [r, {in_features}] and [{out_features}, r] for a weight {list(self.old.shape)}, "
                f"got {list(self.a.shape)} and {list(self.b.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return tuple(self.old.shape)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.old.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums, and of the arithmetic on rows of the weight."""
        return torch.float64 if self.old.dtype == torch.float64 else torch.float32

    def column_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """``sum_i D_ij^2`` ``[in]``, ``<D, W_old>`` and ``||W_old||^2``; one pass over the old weight."""
        # r is small against out and in, so float64 costs little here and no digit is lost in B^T B.
        a, b = self.a.double(), self.b.double() * self.scaling
        squared_update = ((b.mT @ b) @ a).mul_(a).sum(0)
        # A B with zero rows at the end or a fresh adapter must not give a tiny negative square.
        squared_update.clamp_(min=0)
        a_rows = self.a.to(self.dtype).mT
        inner, norm = [], []
        for rows in self._row_blocks():
            old = self.old[rows].to(self.dtype)
            # Sums of each row first: their order does not depend on the number of threads.
            inner.append(((old @ a_rows) * b[rows].to(self.dtype)).sum(1))
            norm.append(torch.linalg.vecdot(old, old))
        empty = torch.zeros(0, dtype=self.dtype, device=self.device)
        inner_product = torch.cat([empty, *inner]).double().sum()
        old_squared_norm = torch.cat([empty, *norm]).double().sum()
        return squared_update.to(self.dtype), inner_product.to(self.dtype), old_squared_norm.to(self.dtype)

    def row_sums(self, column_weights: list[Tensor]) -> list[Tensor]:
        """``sum_j D_ij^2 w_j = s^2 b_i (A diag(w) A^T) b_i^T`` ``[out]`` for each w ``[in]``."""
        a, b = self.a.double(), self.b.double() * self.scaling
        sums = [((b @ ((a * weight.double()) @ a.mT)) * b).sum(1).clamp_(min=0) for weight in column_weights]
        return [total.to(self.dtype) for total in sums]

    def raise_not_finite(self) -> None:
        """Raise a NumericalError that names what holds NaN or Inf."""
        for name, tensor in (("layer_old", self.old), ("lora_A", self.a), ("lora_B", self.b)):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NumericalError(f"{name}: the matrix {list(tensor.shape)} holds {bad} NaN or Inf")
        raise NumericalError("the weights are too large: their squares overflow float32")

    def backend(self) -> dict[str, str]:
        """Which backend serves the sums and the merge."""
        return {"column_scores": "torch", "project_merge": "torch"}

    def merge(
        self, selection: Selection, coefficient: Tensor, granularity: str = "input", out: Tensor | None = None
    ) -> Tensor:
        """The harmonized weight ``[out, in]`` in the dtype of `old`, rounded once; retained elements bit-identical.

        Args:
            selection: its mask `retained` is ``[in]``, or ``[out]`` with output granularity.
            coefficient: scalar c of the orthogonal adjustment.
            granularity: "input" or "output", the dimension of the mask.
            out: where to write, like `old` in shape and dtype; may be `old` itself. None: a new tensor.
        """
        gain = gain_of(selection.retained, coefficient, self.dtype)
        retained = selection.retained if granularity == "input" else selection.retained[:, None]
        a, b = self.a.to(self.dtype), self.b.to(self.dtype)
        merged = torch.empty_like(self.old, memory_format=torch.contiguous_format) if out is None else out
        for rows in self._row_blocks():
            factor = gain if granularity == "input" else gain[rows, None]
            keep = retained if granularity == "input" else retained[rows]
            # Rounded where PEFT and `apply_steps` round, so that a harmonized adapter merges to these very numbers.
            block = torch.mm(b[rows], a).mul_(self.scaling).add_(self.old[rows].to(self.dtype) * factor)
            merged[rows] = torch.where(keep, self.old[rows], block.to(self.old.dtype))
        return merged

    def _row_blocks(self) -> list[slice]:
        return [slice(start, start + _ROWS_AT_A_TIME) for start in range(0, self.old.shape[0], _ROWS_AT_A_TIME)]


def gain_of(retained: Tensor, coefficient: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain ``1 - c (1 - m)`` of each column that the old weight is multiplied with; exactly 1 where retained."""
    one = torch.ones((), dtype=dtype, device=retained.device)
    return torch.where(retained, one, one - coefficient.to(dtype))
