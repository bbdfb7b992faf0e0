"""column_scores: the sums over a pair of weights that HPA needs, in one pass over both."""

from __future__ import annotations

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
from hpa_ext.ops._checks import check_weight_pair
from hpa_ext.ops._library import register


def column_scores(w_old: Tensor, w_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the update ``D = w_new - w_old``: per input column its square, and two inner products.

    Args:
        w_old: ``[out, in]`` bfloat16, float16 or float32 (float64 through torch), any strides.
        w_new: like `w_old` in shape, dtype and device.

    Returns:
        squared_update: ``[in]``, ``sum_i D_ij^2`` (a sum over rows, not a mean).
        inner_product: ``[]``, ``<D, w_old>_F``.
        old_squared_norm: ``[]``, ``||w_old||_F^2``.
        All float32 (float64 for float64 weights), on the device of the weights.

    Raises:
        TypeError, ValueError: the weights differ in shape, dtype or device, or are not matrices.

    Both weights are read once; sums run in an order that does not depend on the thread count. Numerators of HPA's
    scores (CVPR 2026, section 3.1) and of its projection (3.3). Not differentiable.
    """
    if is_traced(w_old, w_new):
        return torch.ops.hpa_ext.column_scores(w_old.detach(), w_new.detach())
    return _column_scores(w_old, w_new)


def _column_scores(w_old: Tensor, w_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squared_update, inner_product, old_squared_norm = _fake(w_old, w_new)
    if backend_of("column_scores", w_old) == "torch":
        return reference.column_scores(w_old.detach(), w_new.detach())
    old, new = unit_stride(w_old.detach()), unit_stride(w_new.detach())
    arguments = (
        old.data_ptr(), row_stride(old), new.data_ptr(), row_stride(new), DTYPE_TAGS[old.dtype], *old.shape,
        squared_update.data_ptr(), inner_product.data_ptr(), old_squared_norm.data_ptr(),
    )  # fmt: skip
    if on_cuda(old):
        scratch = workspace(_C.cuda.column_scores_workspace_bytes(*old.shape), old)
        with device_of(old):
            _C.cuda.column_scores(*arguments, scratch.data_ptr(), stream_of(old))
    else:
        use_torch_threads()
        _C.cpu.column_scores(*arguments)
    return squared_update, inner_product, old_squared_norm


def _fake(w_old: Tensor, w_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_weight_pair(w_old, w_new)
    dtype = torch.float64 if w_old.dtype == torch.float64 else torch.float32
    column = torch.empty(w_old.shape[1], dtype=dtype, device=w_old.device)
    return column, torch.empty((), dtype=dtype, device=w_old.device), torch.empty((), dtype=dtype, device=w_old.device)


register("column_scores(Tensor w_old, Tensor w_new) -> (Tensor, Tensor, Tensor)", _column_scores, _fake)
