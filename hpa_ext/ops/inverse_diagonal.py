"""inverse_diagonal: the diagonal of a damped Gram's inverse, and what to do when the factorisation fails."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.errors import NumericalError
from hpa_ext.ops._backend import backend_of, device_of, is_traced, on_cuda, stream_of, use_torch_threads, workspace
from hpa_ext.ops._checks import check_tensor, describe, is_number
from hpa_ext.ops._library import register

RESCUES = ("damping", "precision", "none")

# Measured over Grams of full rank, of rank 8, of few tokens, of decaying spectrum and with massive columns: the largest
# relative error of a float32 attempt is 7 to 13 eps / (smallest pivot of the unit-diagonal matrix). Below this pivot it
# would exceed 1e-3, and the matrix is factored again in float64. With damping 0.01 that is rare.
SMALLEST_FLOAT32_PIVOT = 1e-3

_DAMPING_STEP = 10.0
_LARGEST_DAMPING = 1.0
_FIRST_DAMPING_OF_NONE = 1e-4
_ASYMMETRY_TOLERANCE = 1e-3
_STRIP = 512


@dataclass(frozen=True)
class InverseDiagonal:
    """A diagonal and how it came about.

    Attributes:
        diagonal: ``[..., in]`` of the dtype of h.
        damping_used: float64 ``[...]``, the relative damping that the factorisation succeeded with.
        precision_bits: int32 ``[...]``, 32 or 64, the precision that it succeeded in.
        failed_minor: int32 ``[...]``, 0 on success; only ``check=False`` lets another value through.
        from_rows: whether it was had from the activations' rows, without the Gram (``ops.inverse_diagonal_of_rows``).
    """

    diagonal: Tensor
    damping_used: Tensor
    precision_bits: Tensor
    failed_minor: Tensor
    from_rows: bool = False

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors in order, as the operator returns them."""
        return self.diagonal, self.damping_used, self.precision_bits, self.failed_minor


def inverse_diagonal(
    h: Tensor,
    damping: float = 0.01,
    *,
    rescue: str = "damping",
    check: bool = True,
    assume_symmetric: bool = False,
    return_report: bool = False,
) -> Tensor | InverseDiagonal:
    """``diag((H + damping * mean(diag H) * I)^-1)`` of each matrix, without forming the inverse.

    Args:
        h: ``[..., in, in]`` float32 (float64 through torch), symmetric positive semidefinite; a batch is independent
            matrices. Not changed.
        damping: relative to the mean of the diagonal, at least 0. HPA uses 0.01.
        rescue: what may be done when float32 does not suffice. "damping": float64, then ten times more damping at a
            time up to 1; "precision": float64 only; "none": neither. Every rescue is in the report.
        check: look at the outcome on the host, which synchronises with a device. With False no rescue happens, nothing
            is raised for the values, and a matrix that failed has a NaN diagonal; needed inside a CUDA graph.
        assume_symmetric: do not compare the two triangles, of which only the lower one is used: for matrices that are
            symmetric by construction. The comparison costs about a fifth of the whole.
        return_report: return an `InverseDiagonal` instead of the diagonal alone.

    Returns:
        ``[..., in]`` of the dtype of h, in the inverse of its unit.

    Raises:
        NumericalError: h holds NaN or Inf (``failing_minor == -1``); is zero; or stays indefinite after the rescue
            (``failing_minor`` is the order of the leading minor that is not positive, ``damping`` the one in force).
        TypeError, ValueError: h is no float32 or float64 square matrix or is not symmetric; damping or rescue is off.

    The matrix is scaled to unit diagonal, ``A = D^-1/2 (H + delta I) D^-1/2 = L L^T``, and entry j is the squared norm
    of column j of ``L^-1``, over ``D_jj``. This is the true diagonal of the inverse, not the squared diagonal of the
    Cholesky factor of the inverse that SparseGPT-like code uses (a conditional variance). Not differentiable.
    """
    if not is_number(damping):
        raise ValueError(f"damping: expected a finite number, at least 0, got {damping!r}")
    if is_traced(h):
        parts = torch.ops.hpa_ext.inverse_diagonal(h.detach(), float(damping), rescue, check, assume_symmetric)
    else:
        parts = _inverse_diagonal(h, float(damping), rescue, check, assume_symmetric)
    return InverseDiagonal(*parts) if return_report else parts[0]


def _fake(
    h: Tensor, damping: float = 0.01, rescue: str = "damping", check: bool = True, assume_symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tensor("h", h, "[..., in, in]", None, (torch.float32, torch.float64))
    if h.dim() < 2 or h.shape[-1] != h.shape[-2]:
        raise ValueError(f"h: expected square matrices [..., in, in], got {describe(h)}")
    if not math.isfinite(damping) or damping < 0:
        raise ValueError(f"damping: expected a finite number, at least 0, got {damping!r}")
    if rescue not in RESCUES:
        raise ValueError(f"rescue: expected one of {', '.join(RESCUES)}, got {rescue!r}")
    batch = h.shape[:-2]
    return (
        torch.empty(h.shape[:-1], dtype=h.dtype, device=h.device),
        torch.full(batch, damping, dtype=torch.float64, device=h.device),
        torch.full(batch, 64 if h.dtype == torch.float64 else 32, dtype=torch.int32, device=h.device),
        torch.empty(batch, dtype=torch.int32, device=h.device),
    )


def _inverse_diagonal(
    h: Tensor, damping: float = 0.01, rescue: str = "damping", check: bool = True, assume_symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = InverseDiagonal(*_fake(h, damping, rescue, check, assume_symmetric))
    size = h.shape[-1]
    if result.diagonal.numel() == 0:
        result.failed_minor.zero_()
        return result.parts()
    matrices = h.detach().reshape(-1, size, size)
    found, failed_minor, smallest_pivot = _attempt(matrices, damping, h.dtype == torch.float64)
    result.diagonal.copy_(found.view(h.shape[:-1]))
    result.failed_minor.copy_(failed_minor.view(h.shape[:-2]))
    if check:
        minors = failed_minor.tolist()
        # NaN compares unequal to itself, so symmetry is judged after the attempt has told NaN and Inf apart.
        _raise_not_finite(minors, damping)
        if not assume_symmetric:
            check_symmetric(matrices)
        for index, (minor, pivot) in enumerate(zip(minors, smallest_pivot.tolist(), strict=True)):
            is_weak = h.dtype == torch.float32 and pivot < SMALLEST_FLOAT32_PIVOT
            if minor != 0 or (is_weak and rescue != "none"):
                _rescue(matrices[index : index + 1], index, minor, damping, rescue, result)
    return result.parts()


def _rescue(matrix: Tensor, index: int, minor: int, damping: float, rescue: str, result: InverseDiagonal) -> None:
    """Float64, then more damping. Writes matrix `index` of the batch's result, or raises."""
    dampings = [damping]
    if rescue == "damping":
        following = damping * _DAMPING_STEP or _FIRST_DAMPING_OF_NONE
        while following <= _LARGEST_DAMPING:
            dampings.append(following)
            following *= _DAMPING_STEP
    for used in dampings if rescue != "none" else []:
        values, failed_minor, _ = _attempt(matrix, used, float64=True)
        minor = int(failed_minor[0])
        if minor == 0:
            result.diagonal.view(-1, matrix.shape[-1])[index] = values[0]
            result.damping_used.view(-1)[index] = used
            result.precision_bits.view(-1)[index] = 64
            result.failed_minor.view(-1)[index] = 0
            return
    which = f"matrix {index} of the batch" if result.failed_minor.numel() > 1 else "the matrix"
    zero = not bool(matrix.diagonal(dim1=-2, dim2=-1).any())
    raise NumericalError(
        f"{which} is zero: no activation reached it"
        if zero
        else f"{which} is not positive definite: leading minor {minor} fails with damping {dampings[-1]:g} "
        f"(rescue={rescue!r})",
        failing_minor=minor,
        damping=dampings[-1],
    )


def _raise_not_finite(minors: list[int], damping: float) -> None:
    bad = [index for index, minor in enumerate(minors) if minor == -1]
    if bad:
        which = f"matrices {bad} of the batch hold" if len(minors) > 1 else "the matrix holds"
        raise NumericalError(f"{which} NaN or Inf", failing_minor=-1, damping=damping)


def check_symmetric(matrices: Tensor) -> None:
    """Raise ValueError unless both triangles of ``[batch, in, in]`` agree, up to the rounding of float32 sums."""
    size = matrices.shape[-1]
    scale = matrices.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    for start in range(0, size, _STRIP):
        rows = slice(start, min(start + _STRIP, size))
        difference = (matrices[:, rows, : rows.stop] - matrices[:, : rows.stop, rows].mT).abs()
        bound = _ASYMMETRY_TOLERANCE * scale[:, rows, None] * scale[:, None, : rows.stop]
        # Not "any above": NaN in the triangle that the kernels do not read compares false either way.
        if not bool((difference <= bound + torch.finfo(matrices.dtype).tiny).all()):
            raise ValueError(
                "h: expected symmetric matrices, but h and its transpose differ by up to "
                f"{float(difference.max()):.3g} in rows {start} to {rows.stop - 1}"
            )


def _attempt(matrices: Tensor, damping: float, float64: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One factorisation of every matrix: diagonal [batch, in], failed_minor [batch] and smallest_pivot [batch]."""
    if backend_of("inverse_diagonal", matrices) == "torch":
        dtype = torch.float64 if float64 else torch.float32
        return reference.inverse_diagonal_attempt(matrices, damping, dtype)
    if matrices.stride(2) != 1 or matrices.stride(1) < matrices.shape[2]:
        matrices = matrices.contiguous()
    batch, size, _ = matrices.shape
    diagonal = torch.empty((batch, size), dtype=torch.float32, device=matrices.device)
    failed_minor = torch.empty(batch, dtype=torch.int32, device=matrices.device)
    smallest_pivot = torch.empty(batch, dtype=torch.float32, device=matrices.device)
    arguments = (
        matrices.data_ptr(), batch, size, matrices.stride(0), matrices.stride(1), damping, float64,
        diagonal.data_ptr(), failed_minor.data_ptr(), smallest_pivot.data_ptr(),
    )  # fmt: skip
    if on_cuda(matrices):
        scratch = workspace(_C.cuda.inverse_diagonal_workspace_bytes(batch, size, float64), matrices)
        with device_of(matrices):
            _C.cuda.inverse_diagonal(*arguments, scratch.data_ptr(), stream_of(matrices))
    else:
        use_torch_threads()
        _C.cpu.inverse_diagonal(*arguments)
    return diagonal, failed_minor, smallest_pivot


register(
    'inverse_diagonal(Tensor h, float damping=0.01, str rescue="damping", bool check=True, '
    "bool assume_symmetric=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _inverse_diagonal,
    _fake,
)
