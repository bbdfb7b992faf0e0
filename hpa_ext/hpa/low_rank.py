"""HPA on a LoRA update without forming the new weight: everything comes from ``W_old``, A and B.

Equations: ``sum_i D_ij^2 = s^2 diag(A^T (B^T B) A)_j``, ``<D, W_old> = s <B, W_old A^T>``, and the result is
``W_old diag(g) + s B (A * (1 - m))`` with the column gain ``g = 1 - c (1 - m)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError
from hpa_ext.hpa.selection import Selection
from hpa_ext.ops._checks import describe


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
        return ops.low_rank_scores(self.old, *self._factors(), self.scaling)

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
        """Which backend serves the sums and the merge: one operation for both."""
        served = ops.low_rank_backend(self.old, *self._factors())
        return {"low_rank": served}

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
        # An adapter harmonized to this gain and this mask merges to the same bits: it takes `ops.low_rank_add`.
        retained = selection.retained
        return ops.low_rank_merge(
            self.old, *self._factors(), self.scaling, retained, coefficient, out, axis=granularity
        )

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are, or widened from a dtype that the operations do not take."""
        a, b = (t if t.dtype in ops.LOW_RANK_DTYPES else t.to(self.dtype) for t in (self.a, self.b))
        return a, b


def gain_of(retained: Tensor, coefficient: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain ``1 - c (1 - m)`` of each column that the old weight is multiplied with; exactly 1 where retained."""
    one = torch.ones((), dtype=dtype, device=retained.device)
    return torch.where(retained, one, one - coefficient.to(dtype))
