"""project_merge: the harmonized weight, in one pass over both weights."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import (
    DTYPE_TAGS,
    backend_of,
    device_of,
    is_traced,
    mark_written,
    on_cuda,
    row_stride,
    stream_of,
    unit_stride,
    use_torch_threads,
)
from hpa_ext.ops._checks import (
    WEIGHT_DTYPES,
    as_coefficient,
    check_axis,
    check_same,
    check_shape,
    check_tensor,
    check_weight_pair,
)
from hpa_ext.ops._library import register


def project_merge(
    w_old: Tensor,
    w_new: Tensor,
    mask: Tensor,
    coefficient: float | Tensor,
    out: Tensor | None = None,
    *,
    axis: str = "input",
) -> Tensor:
    """``M * w_old + (1 - M) * (w_new - coefficient * w_old)``, M being 1 on the retained columns.

    Args:
        w_old: ``[out, in]`` bfloat16, float16 or float32 (float64 through torch), any strides.
        w_new: like `w_old` in shape, dtype and device.
        mask: bool ``[in]``, True on the input columns to retain; with ``axis="output"`` bool ``[out]``, on the rows.
        coefficient: a number, or a tensor of one element on the device of the weights: ``<D, w_old> / ||w_old||^2``
            makes the update orthogonal to the old weight, 0 leaves it as it is.
        out: where to write, like `w_old` in shape, dtype and device; may be `w_old` or `w_new` itself. A tensor that
            overlaps them otherwise gives an undefined result. None: a new contiguous tensor.
        axis: "input" or "output", the dimension of the mask.

    Returns:
        `out`. Retained elements are bit-identical to `w_old`; the others are computed in float32 (float64 for float64
        weights) and rounded once, to nearest even.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument. `out` is then unchanged.

    Each weight is read once, and the result written once. HPA (CVPR 2026), section 3.3. Not differentiable.
    """
    check_tensor("w_old", w_old, "[out, in]", 2, WEIGHT_DTYPES)  # the coefficient takes its dtype and device from it
    coefficient = as_coefficient(coefficient, w_old)
    if is_traced(w_old, w_new, mask, coefficient, out):
        if out is None:
            return torch.ops.hpa_ext.project_merge(w_old.detach(), w_new.detach(), mask, coefficient, axis)
        torch.ops.hpa_ext.project_merge_out(w_old.detach(), w_new.detach(), mask, coefficient, axis, out.detach())
        return out
    if out is None:
        return _project_merge(w_old, w_new, mask, coefficient, axis)
    _project_merge_out(w_old, w_new, mask, coefficient, axis, out)
    return out


def _check(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str, out: Tensor) -> None:
    check_weight_pair(w_old, w_new)
    check_axis(axis)
    check_tensor("mask", mask, f"[{axis} columns]", 1, (torch.bool,))
    length = w_old.shape[1] if axis == "input" else w_old.shape[0]
    check_shape("mask", mask, (length,), f"for axis {axis!r} of w_old {list(w_old.shape)}")
    check_same("mask", mask, "w_old", w_old, dtype=False)
    check_tensor("coefficient", coefficient, "[]", 0, (reference.compute_dtype(w_old),))
    check_same("coefficient", coefficient, "w_old", w_old, dtype=False)
    check_tensor("out", out, "[out, in]", 2)
    check_shape("out", out, tuple(w_old.shape), "like w_old")
    check_same("out", out, "w_old", w_old)


def _project_merge(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str) -> Tensor:
    out = _fake(w_old, w_new, mask, coefficient, axis)
    _write(w_old, w_new, mask, coefficient, axis, out)
    return out


def _fake(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str) -> Tensor:
    out = torch.empty(w_old.shape, dtype=w_old.dtype, device=w_old.device)
    _check(w_old, w_new, mask, coefficient, axis, out)
    return out


def _project_merge_out(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str, out: Tensor) -> None:
    _check(w_old, w_new, mask, coefficient, axis, out)
    _write(w_old, w_new, mask, coefficient, axis, out)


def _write(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str, out: Tensor) -> None:
    """Dispatch, for arguments that have passed `_check`."""
    if out.numel() == 0:
        return
    if backend_of("project_merge", w_old) == "torch":
        merged = reference.project_merge(w_old.detach(), w_new.detach(), mask, coefficient, axis=axis)
        out.detach().copy_(merged)
        return
    old, new, destination = unit_stride(w_old.detach()), unit_stride(w_new.detach()), out.detach()
    target = unit_stride(destination)
    if target is not destination:
        target = torch.empty_like(destination, memory_format=torch.contiguous_format)
    mask = mask.contiguous()
    arguments = (
        old.data_ptr(), row_stride(old), new.data_ptr(), row_stride(new), target.data_ptr(), row_stride(target),
        DTYPE_TAGS[old.dtype], *old.shape, mask.data_ptr(), axis == "output", coefficient.data_ptr(),
    )  # fmt: skip
    if on_cuda(old):
        with device_of(old):
            _C.cuda.project_merge(*arguments, stream_of(old))
    else:
        use_torch_threads()
        _C.cpu.project_merge(*arguments)
    if target is destination:
        mark_written(destination)
    else:
        destination.copy_(target)


register(
    "project_merge(Tensor w_old, Tensor w_new, Tensor mask, Tensor coefficient, str axis) -> Tensor",
    _project_merge,
    _fake,
)
register(
    "project_merge_out(Tensor w_old, Tensor w_new, Tensor mask, Tensor coefficient, str axis, Tensor(a!) out) -> ()",
    _project_merge_out,
    _check,
)
