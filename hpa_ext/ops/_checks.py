"""Argument checks. Each names the argument, what was expected, and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import reference

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: object) -> str:
    """What came, in the words of an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    name: str, value: object, shape: str, dimensions: int | None = None, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    """`value` is a strided tensor with so many dimensions (None: at least one) and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor {shape}, got layout {value.layout}")
    if value.dim() != dimensions if dimensions is not None else value.dim() < 1:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {shape} of dtype {allowed}, got {describe(value)}")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], because: str) -> None:
    """`value` has exactly this shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} {because}, got {describe(value)}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`value` is on the device, and of the dtype, of `other`."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {other_name}, got {describe(value)}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} like {other_name}, got {describe(value)}")


def check_weight_pair(w_old: Tensor, w_new: Tensor, of: str = "") -> None:
    """Two weights [out, in] of one shape, dtype and device; `of` follows their names, such as "[3]" in a list."""
    check_tensor(f"w_old{of}", w_old, "[out, in]", 2, WEIGHT_DTYPES)
    check_tensor(f"w_new{of}", w_new, "[out, in]", 2, WEIGHT_DTYPES)
    check_shape(f"w_new{of}", w_new, tuple(w_old.shape), f"like w_old{of}")
    check_same(f"w_new{of}", w_new, f"w_old{of}", w_old)


def is_number(value: object) -> bool:
    """A real number that is not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_axis(axis: object) -> None:
    """Along which dimension of a weight a mask or a gain runs."""
    if axis not in ("input", "output"):
        raise ValueError(f'axis: expected "input" or "output", got {axis!r}')


def as_coefficient(coefficient: float | Tensor, w_old: Tensor) -> Tensor:
    """A projection coefficient as a scalar of the weight's compute dtype, on its device."""
    dtype = reference.compute_dtype(w_old)
    if is_number(coefficient) or isinstance(coefficient, torch.SymFloat):
        return torch.full((), coefficient, dtype=dtype, device=w_old.device)
    if not isinstance(coefficient, Tensor) or coefficient.numel() != 1:
        raise TypeError(f"coefficient: expected a number or a tensor of one element, got {describe(coefficient)}")
    check_same("coefficient", coefficient, "w_old", w_old, dtype=False)
    return coefficient.detach().to(dtype).reshape(())
