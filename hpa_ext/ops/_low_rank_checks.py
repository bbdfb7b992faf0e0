"""Argument checks of the low_rank operations."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import reference
from hpa_ext.ops._checks import (
    WEIGHT_DTYPES,
    check_axis,
    check_same,
    check_shape,
    check_tensor,
    describe,
    is_number,
)


def as_scaling(scaling: float) -> float:
    """The scaling as a float. TypeError for what is no number."""
    if isinstance(scaling, Tensor) or not (is_number(scaling) or isinstance(scaling, torch.SymFloat)):
        raise TypeError(f"scaling: expected a number, got {describe(scaling)}")
    return float(scaling) if is_number(scaling) else scaling


def check_factors(name: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """A weight ``[out, in]``, A ``[r, in]`` and B ``[out, r]`` on its device, each of any dtype that is taken."""
    check_tensor(name, weight, "[out, in]", 2, WEIGHT_DTYPES)
    check_tensor("a", a, "[r, in]", 2, WEIGHT_DTYPES)
    check_tensor("b", b, "[out, r]", 2, WEIGHT_DTYPES)
    check_shape("a", a, (a.shape[0], weight.shape[1]), f"for {name} {list(weight.shape)}")
    check_shape("b", b, (weight.shape[0], a.shape[0]), f"for {name} {list(weight.shape)} and a {list(a.shape)}")
    check_same("a", a, name, weight, dtype=False)
    check_same("b", b, name, weight, dtype=False)


def check_out(name: str, weight: Tensor, axis: str, out: Tensor) -> None:
    """A place like the weight, and an axis."""
    check_axis(axis)
    check_tensor("out", out, "[out, in]", 2)
    check_shape("out", out, tuple(weight.shape), f"like {name}")
    check_same("out", out, name, weight)


def check_along(name: str, value: Tensor, weight_name: str, weight: Tensor, axis: str, dtype: torch.dtype) -> None:
    """A vector along an axis of the weight."""
    check_tensor(name, value, f"[{axis} columns]", 1, (dtype,))
    length = weight.shape[1] if axis == "input" else weight.shape[0]
    check_shape(name, value, (length,), f"for axis {axis!r} of {weight_name} {list(weight.shape)}")
    check_same(name, value, weight_name, weight, dtype=False)


def check_merge(
    w_old: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor, coefficient: Tensor, axis: str, out: Tensor
) -> None:
    """The arguments of `low_rank_merge`."""
    check_factors("w_old", w_old, a, b)
    check_out("w_old", w_old, axis, out)
    check_along("mask", mask, "w_old", w_old, axis, torch.bool)
    check_tensor("coefficient", coefficient, "[]", 0, (reference.compute_dtype(w_old),))
    check_same("coefficient", coefficient, "w_old", w_old, dtype=False)


def check_add(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, gain: Tensor | None, axis: str, out: Tensor
) -> None:
    """The arguments of `low_rank_add`."""
    check_factors("weight", weight, a, b)
    check_out("weight", weight, axis, out)
    if gain is not None:
        check_along("gain", gain, "weight", weight, axis, reference.compute_dtype(weight))
