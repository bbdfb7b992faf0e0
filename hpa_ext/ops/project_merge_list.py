"""project_merge for a list of layers: one launch on CUDA, one parallel region on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

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
from hpa_ext.ops._checks import check_axis, check_same, check_shape, check_tensor
from hpa_ext.ops._library import register
from hpa_ext.ops._lists import as_list, check_apart, check_weight_lists


def project_merge_list(
    w_old: Sequence[Tensor],
    w_new: Sequence[Tensor],
    masks: Sequence[Tensor],
    coefficients: Tensor,
    outs: Sequence[Tensor] | None = None,
    *,
    axis: str = "input",
) -> list[Tensor]:
    """``M_l w_old[l] + (1 - M_l)(w_new[l] - coefficients[l] w_old[l])``: `project_merge` for each layer, bit for bit.

    Args:
        w_old: for each layer ``[out_l, in_l]`` bfloat16, float16 or float32, mixed as they come (float64 through
            torch: all layers or none), any strides; all on one device.
        w_new: like `w_old`, layer by layer, in shape, dtype and device.
        masks: for each layer bool ``[in_l]``, True on the input columns to retain; with ``axis="output"`` bool
            ``[out_l]``, on the rows.
        coefficients: ``[layers]`` on the device of the weights.
        outs: for each layer where to write, like ``w_old[l]`` in shape, dtype and device; may be ``w_old[l]`` or
            ``w_new[l]`` itself, and must not share memory with what belongs to another layer. A tensor that overlaps
            its own layer's weights otherwise gives an undefined result. None: new contiguous tensors.
        axis: "input" or "output", the dimension of the masks.

    Returns:
        `outs`, as a list. Retained elements are bit-identical to ``w_old[l]``; the others are computed in float32
        (float64 for float64 weights) and rounded once, to nearest even.

    Raises:
        TypeError, ValueError: no lists of one length, or a layer is not as above; the message gives its number. Nothing
            is then written, to any layer.

    HPA (CVPR 2026), section 3.3. Not differentiable.
    """
    w_old, w_new = as_list("w_old", w_old), as_list("w_new", w_new)
    check_weight_lists(w_old, w_new)  # the coefficients take their dtype and device from them
    masks = as_list("masks", masks, len(w_old), "w_old")
    coefficients = _as_coefficients(coefficients, w_old)
    outs = None if outs is None else as_list("outs", outs, len(w_old), "w_old")
    _check_rest(w_old, masks, coefficients, axis, outs)
    if w_old and is_traced(*w_old, *w_new, *masks, coefficients, *(outs or ())):
        arguments = [w.detach() for w in w_old], [w.detach() for w in w_new], masks, coefficients, axis
        if outs is None:
            return torch.ops.hpa_ext.project_merge_list(*arguments)
        torch.ops.hpa_ext.project_merge_list_out(*arguments, [out.detach() for out in outs])
        return outs
    if outs is None:
        outs = _empty_outs(w_old)
    else:
        check_apart(outs, w_old, w_new)
    _write(w_old, w_new, masks, coefficients, axis, outs)
    return outs


def _as_coefficients(coefficients: Tensor, w_old: list[Tensor]) -> Tensor:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_tensor("coefficients", coefficients, "[layers]", 1, dtypes)
    dtype = reference.compute_dtype(w_old[0]) if w_old else torch.float32
    return coefficients.detach().to(dtype)


def _check_rest(
    w_old: list[Tensor], masks: list[Tensor], coefficients: Tensor, axis: str, outs: list[Tensor] | None
) -> None:
    """Everything but the weights, which have been checked."""
    check_axis(axis)
    as_list("masks", masks, len(w_old), "w_old")
    dimension = 1 if axis == "input" else 0
    for i, (old, mask) in enumerate(zip(w_old, masks, strict=True)):
        check_tensor(f"masks[{i}]", mask, f"[{axis} columns]", 1, (torch.bool,))
        because = f"for axis {axis!r} of w_old[{i}] {list(old.shape)}"
        check_shape(f"masks[{i}]", mask, (old.shape[dimension],), because)
        check_same(f"masks[{i}]", mask, f"w_old[{i}]", old, dtype=False)
    dtype = reference.compute_dtype(w_old[0]) if w_old else torch.float32
    check_tensor("coefficients", coefficients, "[layers]", 1, (dtype,))
    check_shape("coefficients", coefficients, (len(w_old),), "one for each layer")
    if w_old:
        check_same("coefficients", coefficients, "w_old[0]", w_old[0], dtype=False)
    if outs is None:
        return
    as_list("outs", outs, len(w_old), "w_old")
    for i, (old, out) in enumerate(zip(w_old, outs, strict=True)):
        check_tensor(f"outs[{i}]", out, "[out, in]", 2)
        check_shape(f"outs[{i}]", out, tuple(old.shape), f"like w_old[{i}]")
        check_same(f"outs[{i}]", out, f"w_old[{i}]", old)


def _empty_outs(w_old: list[Tensor]) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in w_old]


def _fake(
    w_old: list[Tensor], w_new: list[Tensor], masks: list[Tensor], coefficients: Tensor, axis: str
) -> list[Tensor]:
    check_weight_lists(w_old, w_new)
    _check_rest(w_old, masks, coefficients, axis, None)
    return _empty_outs(w_old)


def _project_merge_list(
    w_old: list[Tensor], w_new: list[Tensor], masks: list[Tensor], coefficients: Tensor, axis: str
) -> list[Tensor]:
    outs = _fake(w_old, w_new, masks, coefficients, axis)
    _write(w_old, w_new, masks, coefficients, axis, outs)
    return outs


def _fake_out(
    w_old: list[Tensor],
    w_new: list[Tensor],
    masks: list[Tensor],
    coefficients: Tensor,
    axis: str,
    outs: list[Tensor],
) -> None:
    check_weight_lists(w_old, w_new)
    _check_rest(w_old, masks, coefficients, axis, outs)


def _project_merge_list_out(
    w_old: list[Tensor],
    w_new: list[Tensor],
    masks: list[Tensor],
    coefficients: Tensor,
    axis: str,
    outs: list[Tensor],
) -> None:
    _fake_out(w_old, w_new, masks, coefficients, axis, outs)
    check_apart(outs, w_old, w_new)
    _write(w_old, w_new, masks, coefficients, axis, outs)


def _write(
    w_old: list[Tensor],
    w_new: list[Tensor],
    masks: list[Tensor],
    coefficients: Tensor,
    axis: str,
    outs: list[Tensor],
) -> None:
    """Dispatch, for arguments that have passed the checks."""
    if not w_old:
        return
    if backend_of("project_merge", w_old[0]) == "torch":
        for old, new, mask, coefficient, out in zip(w_old, w_new, masks, coefficients, outs, strict=True):
            out.detach().copy_(reference.project_merge(old.detach(), new.detach(), mask, coefficient, axis=axis))
        return
    coefficients = coefficients.contiguous()
    destinations = [out.detach() for out in outs]
    targets = [unit_stride(out) for out in destinations]
    old, new = [unit_stride(w.detach()) for w in w_old], [unit_stride(w.detach()) for w in w_new]
    flat = [mask.contiguous() for mask in masks]
    at, by_rows = coefficients.data_ptr(), axis == "output"
    items = [
        (
            a.data_ptr(), row_stride(a), b.data_ptr(), row_stride(b), out.data_ptr(), row_stride(out),
            DTYPE_TAGS[a.dtype], *a.shape, mask.data_ptr(), by_rows, at + 4 * layer,
        )
        for layer, (a, b, out, mask) in enumerate(zip(old, new, targets, flat, strict=True))
    ]  # fmt: skip
    if on_cuda(old[0]):
        with device_of(old[0]):
            _C.cuda.project_merge_list(items, stream_of(old[0]))
    else:
        use_torch_threads()
        _C.cpu.project_merge_list(items)
    for target, destination in zip(targets, destinations, strict=True):
        if target is destination:
            mark_written(destination)
        else:
            destination.copy_(target)


register(
    "project_merge_list(Tensor[] w_old, Tensor[] w_new, Tensor[] masks, Tensor coefficients, str axis) -> Tensor[]",
    _project_merge_list,
    _fake,
)
register(
    "project_merge_list_out(Tensor[] w_old, Tensor[] w_new, Tensor[] masks, Tensor coefficients, str axis, "
    "Tensor(a!)[] outs) -> ()",
    _project_merge_list_out,
    _fake_out,
)
