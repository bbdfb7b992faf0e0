"""The diagonal of a damped Gram's inverse from the rows themselves, for fewer tokens than features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import DTYPE_TAGS, backend_of, row_stride, unit_stride, use_torch_threads
from hpa_ext.ops._checks import WEIGHT_DTYPES, check_tensor, describe, is_number

# Measured over rows of full rank, with a common mean, a decaying spectrum, massive features or tokens, and repeated or
# nearly repeated tokens: the largest relative error is at most 6.2 eps / (smallest pivot * smallest remainder). Below
# this product it could come near 1e-3, as with SMALLEST_FLOAT32_PIVOT of the other form. Above it, the largest error
# seen was 2.5e-5.
SMALLEST_PRODUCT = 1e-3


@dataclass(frozen=True)
class RowsDiagonal:
    """A diagonal from rows, and how far it can be trusted.

    Attributes:
        diagonal: ``[in]`` float32, ``diag((X^T X + damping mean(diag X^T X) I)^-1)``; NaN where the attempt failed.
        squares: ``[in]`` float32, ``diag(X^T X)``.
        failed_minor: 0 on success; -1 for NaN, Inf or overflow; otherwise a factorisation failed, or all rows are zero.
        smallest_pivot: of the factored matrices of unit diagonal.
        smallest_remainder: the least that was left of 1 in ``1 - x_j^T G^-1 x_j``.
    """

    diagonal: Tensor
    squares: Tensor
    failed_minor: int
    smallest_pivot: float
    smallest_remainder: float

    @property
    def is_accurate(self) -> bool:
        """Whether the error bound, ``6.2 eps / (smallest_pivot * smallest_remainder)``, stays below 1e-3."""
        return self.failed_minor == 0 and self.smallest_pivot * self.smallest_remainder >= SMALLEST_PRODUCT


def inverse_diagonal_of_rows(x: Tensor, damping: float = 0.01) -> RowsDiagonal:
    """``diag((X^T X + damping mean(diag X^T X) I)^-1)`` without ``X^T X``: ``2 tokens^2 in`` operations at most.

    Args:
        x: ``[tokens, in]`` bfloat16, float16 or float32, at least one token; all count.
        damping: relative to the mean of the diagonal, above 0.

    Returns:
        The diagonal and what bounds its error. Looks at the outcome on the host.

    Raises:
        TypeError, ValueError: x or damping is none of these.

    Woodbury: ``(X^T X + delta I)^-1 = (I - X^T G^-1 X) / delta`` with ``G = X X^T + delta I``; features whose square
    sum exceeds the mean ten times are joined by a second, small step, because for them the difference would cancel
    (csrc/cpu/inverse_diagonal_rows.cpp). No rescue: where it does not suffice, form the Gram. Not differentiable.
    """
    check_tensor("x", x, "[tokens, in]", 2, WEIGHT_DTYPES)
    if x.shape[0] == 0:
        raise ValueError(f"x: expected at least one token, got {describe(x)}")
    if not is_number(damping) or not 0 < damping < math.inf:
        raise ValueError(f"damping: expected a finite number above 0, got {damping!r}")
    x = x.detach()
    if x.dtype not in DTYPE_TAGS or backend_of("inverse_diagonal", x) != "native" or x.is_cuda:
        diagonal, squares, *rest = reference.inverse_diagonal_of_rows(x, float(damping))
    else:
        x = unit_stride(x)
        diagonal, squares = torch.empty(2, x.shape[1])
        failed, pivot, remainder = torch.empty(1, dtype=torch.int32), torch.empty(1), torch.empty(1)
        use_torch_threads()
        _C.cpu.inverse_diagonal_of_rows(
            x.data_ptr(), DTYPE_TAGS[x.dtype], *x.shape, row_stride(x), float(damping),
            diagonal.data_ptr(), squares.data_ptr(), failed.data_ptr(), pivot.data_ptr(), remainder.data_ptr(),
        )  # fmt: skip
        rest = [failed, pivot, remainder]
    failed_minor, smallest_pivot, smallest_remainder = (value.item() for value in rest)
    return RowsDiagonal(diagonal, squares, int(failed_minor), float(smallest_pivot), float(smallest_remainder))
