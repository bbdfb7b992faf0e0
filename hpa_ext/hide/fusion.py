"""Fusing experts into one update, or into one weight: pure tensors in, tensors out (HiDe, equation 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.hide.experts import ExpertUpdate
from hpa_ext.precision import without_autocast

# In float32 64 MiB: large enough for a matrix product, small beside the weights of a large layer.
_ELEMENTS_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class FusedUpdate:
    """The sum of experts: ``W -> W diag(gain) + b a``.

    Attributes:
        a: ``[R, in]``, b: ``[out, R]``, float32 (float64 if an expert is); scaling and coefficients are in b.
        gain: ``[in]`` of their dtype, or None where every expert is plain LoRA.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None


def fuse(updates: Sequence[ExpertUpdate], coefficients: Sequence[float], fusion: str) -> FusedUpdate:
    """Sum experts of one linear.

    Args:
        updates: at least one.
        coefficients: e_c of each.
        fusion: "delta": ``sum_c e_c s_c B_c A_c``, exact: the factors side by side, their ranks added. "factors":
            ``(sum_c e_c s_c B_c)(sum_c e_c A_c)``, the authors' code: one expert's rank, with cross terms between
            experts and e_c squared. Ranks must then be equal.

    Raises:
        ValueError: no update; ranks that differ with "factors".
    """
    if not updates:
        raise ValueError("updates: expected at least one, got none")
    double = any(torch.float64 in (update.a.dtype, update.b.dtype) for update in updates)
    dtype = torch.float64 if double else torch.float32
    device = updates[0].a.device
    a = [update.a.to(device, dtype) for update in updates]
    b = [
        update.b.to(device, dtype) * (coefficient * update.scaling)
        for update, coefficient in zip(updates, coefficients, strict=True)
    ]
    gain = None
    if any(update.gain_change is not None for update in updates):
        gain = torch.ones(a[0].shape[1], dtype=dtype, device=device)
        for update, coefficient in zip(updates, coefficients, strict=True):
            if update.gain_change is not None:
                gain = gain + coefficient * update.gain_change.to(device, dtype)
    if fusion == "delta":
        return FusedUpdate(torch.cat(a), torch.cat(b, dim=1), gain)
    ranks = sorted({update.rank for update in updates})
    if len(ranks) > 1:
        raise ValueError(f"fusion: expected experts of equal rank for 'factors', got {', '.join(map(str, ranks))}")
    summed = sum(value * coefficient for value, coefficient in zip(a, coefficients, strict=True))
    return FusedUpdate(summed, sum(b), gain)


def fuse_into(weight: Tensor, update: FusedUpdate) -> Tensor:
    """``weight diag(gain) + b a`` for weight ``[out, in]``, in the weight's dtype.

    Summed in float32 (float64 for float64) and rounded once, some rows at a time. Always from the weight before any
    fusion, so that adding and removing experts leaves no trace of rounding.
    """
    dtype = torch.float64 if torch.float64 in (weight.dtype, update.a.dtype) else torch.float32
    a, b = update.a.to(weight.device, dtype), update.b.to(weight.device, dtype)
    gain = None if update.gain is None else update.gain.to(weight.device, dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, weight.shape[1]))
    with without_autocast(weight):
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            total = weight[rows].to(dtype)
            if gain is not None:
                total = total * gain
            result[rows] = torch.addmm(total, b[rows], a)
    return result


def require_finite(name: str, tensors: Sequence[Tensor], what: str) -> None:
    """NumericalError, with the module's name, if one of these is not finite: experts that leave the dtype's range."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NumericalError(
            f"{what} are not finite in {tensors[0].dtype}: the base holds NaN or Inf, or the experts are too large for "
            "this dtype",
            module=name,
        )


def fuse_projectors(
    base: dict[str, Tensor], projectors: Sequence[dict[str, Tensor]], coefficients: Sequence[float], how: str
) -> dict[str, Tensor]:
    """One projector of several, by parameter name, in the base's dtypes.

    Args:
        base: the base model's projector.
        projectors: one per task that has one, in the order of the tasks; none gives the base.
        coefficients: of each, for "fused".
        how: "fused" ``P0 + sum_c e_c (P_c - P0)``, "mean", "last" or "base", see `HiDeConfig.projector`.

    Summed in float64 and rounded once.
    """
    if not projectors or how == "base":
        return {name: value.clone() for name, value in base.items()}
    if how == "last":
        return {name: projectors[-1][name].to(value.device, value.dtype, copy=True) for name, value in base.items()}
    result = {}
    for name, value in base.items():
        start = value.double()
        if how == "mean":
            total = sum(projector[name].to(value.device).double() for projector in projectors) / len(projectors)
        else:
            total = start + sum(
                coefficient * (projector[name].to(value.device).double() - start)
                for projector, coefficient in zip(projectors, coefficients, strict=True)
            )
        result[name] = total.to(value.dtype)
    return result
