"""cholesky: the factor of a symmetric matrix, kept, and rows times the inverse as often as wanted.

No operator of torch.library: whoever factors a matrix looks at the outcome on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import _C
from hpa_ext.ops._backend import row_stride, unit_stride, use_torch_threads
from hpa_ext.ops._checks import check_same, check_shape, check_tensor

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Cholesky:
    """``S = D^1/2 L L^T D^1/2`` with ``D = diag S``, or why there is none.

    Attributes:
        size: of S.
        dtype: float32 or float64, of the factorisation.
        failed_minor: 0 on success; k > 0: leading minor k is not positive; -1: NaN or Inf.
        smallest_pivot: the smallest squared pivot of the matrix of unit diagonal: near 0 few digits are left.
        backend: "native" or "torch".
    """

    size: int
    dtype: torch.dtype
    failed_minor: int
    smallest_pivot: float
    backend: str
    _factor: Tensor
    _scale: Tensor | None

    def solve_rows(self, rows: Tensor) -> Tensor:
        """``rows S^-1`` ``[k, in]`` of rows ``[k, in]``, in the dtype of the factorisation and on its device.

        Raises:
            TypeError, ValueError: rows do not fit; the factorisation had failed.
        """
        if self.failed_minor != 0:
            raise ValueError(f"the matrix was not factored: leading minor {self.failed_minor}")
        check_tensor("rows", rows, "[k, in]", 2, _DTYPES)
        check_shape("rows", rows, (rows.shape[0], self.size), "for this factor")
        check_same("rows", rows, "the factor", self._factor, dtype=False)
        rows = rows.detach().to(self.dtype)
        if self.backend == "torch":
            return torch.cholesky_solve((rows * self._scale).mT, self._factor).mT * self._scale
        rows = unit_stride(rows)
        out = torch.empty(rows.shape, dtype=rows.dtype)
        use_torch_threads()
        _C.cpu.cholesky_solve(
            self._factor.data_ptr(), rows.data_ptr(), *rows.shape, row_stride(rows), out.data_ptr(), row_stride(out)
        )
        return out


def cholesky(s: Tensor, diagonal: Tensor) -> Cholesky:
    """Factor a symmetric matrix; a failure is in the result, and nothing is raised for the values.

    Args:
        s: ``[in, in]`` float32 or float64, of which the lower triangle is read, without its diagonal. May be
            overwritten.
        diagonal: ``[in]`` float64, the diagonal in place of that of s, which so can be damped without rounding.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or device.

    The native kernel serves float32 on the CPU, torch everything else. Synchronises with a device.
    """
    check_tensor("s", s, "[in, in]", 2, _DTYPES)
    check_shape("s", s, (s.shape[1], s.shape[1]), "a square")
    check_tensor("diagonal", diagonal, "[in]", 1, (torch.float64,))
    check_shape("diagonal", diagonal, (s.shape[0],), "for s")
    check_same("diagonal", diagonal, "s", s, dtype=False)
    s, diagonal = s.detach(), diagonal.detach()
    if s.device.type != "cpu" or s.dtype == torch.float64:
        return reference_cholesky(s, diagonal)
    s, diagonal = unit_stride(s), diagonal.contiguous()
    size = s.shape[0]
    factor = torch.empty(_C.cpu.cholesky_factor_size(size), dtype=torch.float32)
    failed_minor, smallest_pivot = torch.empty((), dtype=torch.int32), torch.empty((), dtype=torch.float32)
    use_torch_threads()
    _C.cpu.cholesky(
        s.data_ptr(), size, row_stride(s), diagonal.data_ptr(), factor.data_ptr(), failed_minor.data_ptr(),
        smallest_pivot.data_ptr(),
    )  # fmt: skip
    return Cholesky(size, s.dtype, int(failed_minor), float(smallest_pivot), "native", factor, None)


def reference_cholesky(s: Tensor, diagonal: Tensor) -> Cholesky:
    """`cholesky` in plain torch, on any device; s is overwritten."""
    size = s.shape[0]
    # What cannot be scaled stays as it is, so that its minor is the one that fails.
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt().to(s.dtype)
    s.mul_(scale).mul_(scale[:, None])
    s.diagonal().copy_(torch.where(diagonal > 0, torch.ones_like(diagonal), diagonal))
    factor, info = torch.linalg.cholesky_ex(s)
    minor, pivots = int(info), factor.diagonal().square()
    if minor == 0 and not bool((pivots > 0).all()):
        minor = int((~(pivots > 0)).nonzero()[0]) + 1
    if not bool(torch.isfinite(diagonal).all()) or (minor != 0 and not bool(torch.isfinite(s.tril()).all())):
        minor = -1
    pivot = float(pivots.min()) if minor == 0 and size else 1.0 if minor == 0 else float("nan")
    return Cholesky(size, s.dtype, minor, pivot, "torch", factor, scale)
