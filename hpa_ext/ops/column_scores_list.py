"""column_scores for a list of layers: one launch a phase on CUDA, one parallel region on the CPU."""

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
    on_cuda,
    row_stride,
    stream_of,
    unit_stride,
    use_torch_threads,
    workspace,
)
from hpa_ext.ops._library import register
from hpa_ext.ops._lists import as_list, check_weight_lists


def column_scores_list(w_old: Sequence[Tensor], w_new: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sums over the updates ``D_l = w_new[l] - w_old[l]`` of a list of layers: `column_scores` for each, bit for bit.

    Args:
        w_old: for each layer ``[out_l, in_l]`` bfloat16, float16 or float32, mixed as they come (float64 through
            torch: all layers or none), any strides; all on one device.
        w_new: like `w_old`, layer by layer, in shape, dtype and device.

    Returns:
        squared_update: for each layer ``[in_l]``, ``sum_i D_ij^2`` (a sum over rows, not a mean).
        inner_product: ``[layers]``, ``<D_l, w_old[l]>_F``.
        old_squared_norm: ``[layers]``, ``||w_old[l]||_F^2``.
        All float32 (float64 for float64 weights), on the device of the weights; of an empty list on the CPU.

    Raises:
        TypeError, ValueError: no lists of one length, or a layer is not as above; the message gives its number.

    The result of a layer does not depend on what else is in the list. Not differentiable.
    """
    w_old, w_new = as_list("w_old", w_old), as_list("w_new", w_new)
    if is_traced(*w_old, *w_new) and w_old:
        check_weight_lists(w_old, w_new)
        return torch.ops.hpa_ext.column_scores_list([w.detach() for w in w_old], [w.detach() for w in w_new])
    return _column_scores_list(w_old, w_new)


def _column_scores_list(w_old: list[Tensor], w_new: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    squares, inner_products, norms = _fake(w_old, w_new)
    if not w_old:
        return squares, inner_products, norms
    if backend_of("column_scores", w_old[0]) == "torch":
        parts = [reference.column_scores(a.detach(), b.detach()) for a, b in zip(w_old, w_new, strict=True)]
        squares, inner, norm = (list(part) for part in zip(*parts, strict=True))
        return squares, torch.stack(inner), torch.stack(norm)
    old, new = [unit_stride(w.detach()) for w in w_old], [unit_stride(w.detach()) for w in w_new]
    inner_at, norm_at = inner_products.data_ptr(), norms.data_ptr()
    items = [
        (
            a.data_ptr(), row_stride(a), b.data_ptr(), row_stride(b), DTYPE_TAGS[a.dtype], *a.shape,
            squared.data_ptr(), inner_at + 4 * layer, norm_at + 4 * layer,
        )
        for layer, (a, b, squared) in enumerate(zip(old, new, squares, strict=True))
    ]  # fmt: skip
    if on_cuda(old[0]):
        scratch = workspace(_C.cuda.column_scores_list_workspace_bytes(items), old[0])
        with device_of(old[0]):
            _C.cuda.column_scores_list(items, scratch.data_ptr(), stream_of(old[0]))
    else:
        use_torch_threads()
        _C.cpu.column_scores_list(items)
    return squares, inner_products, norms


def _fake(w_old: list[Tensor], w_new: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    check_weight_lists(w_old, w_new)
    dtype = reference.compute_dtype(w_old[0]) if w_old else torch.float32
    device = w_old[0].device if w_old else None
    squares = [torch.empty(w.shape[1], dtype=dtype, device=device) for w in w_old]
    return (
        squares,
        torch.empty(len(w_old), dtype=dtype, device=device),
        torch.empty(len(w_old), dtype=dtype, device=device),
    )


register("column_scores_list(Tensor[] w_old, Tensor[] w_new) -> (Tensor[], Tensor, Tensor)", _column_scores_list, _fake)
