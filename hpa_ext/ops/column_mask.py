"""column_mask: exactly the k highest scores, as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import backend_of, device_of, is_traced, on_cuda, stream_of, use_torch_threads
from hpa_ext.ops._checks import check_same, check_shape, check_tensor, describe
from hpa_ext.ops._library import register


def column_mask(scores: Tensor, count: int | Tensor, eligible: Tensor | None = None) -> Tensor:
    """Mark exactly `count` of the highest scores along the last dimension.

    Args:
        scores: ``[..., columns]`` float32 (float64 through torch).
        count: how many to mark: an int for all rows, or int64 ``[...]``, one for each row, on the device of the scores
            (so that a count computed there needs no synchronisation). Clamped to [0, eligible columns].
        eligible: ``[..., columns]`` bool; only these may be marked. None: all.

    Returns:
        bool ``[..., columns]``, True at the marked columns.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a negative int count.

    Ties go to the lower index, -0 equals +0, and NaN ranks below every number.
    """
    counts = _as_counts(scores, count)
    if is_traced(scores, counts, eligible):
        return torch.ops.hpa_ext.column_mask(scores.detach(), counts, eligible)
    return _column_mask(scores, counts, eligible)


def _as_counts(scores: Tensor, count: int | Tensor) -> Tensor:
    check_tensor("scores", scores, "[..., columns]", None, (torch.float32, torch.float64))
    if isinstance(count, Tensor):
        return count
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"count: expected an int or an int64 tensor {list(scores.shape[:-1])}, got {describe(count)}")
    if isinstance(count, int):
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        count = min(count, scores.shape[-1])  # any int may be asked for, also one that int64 cannot hold
    return torch.full(scores.shape[:-1], count, dtype=torch.int64, device=scores.device)


def _column_mask(scores: Tensor, counts: Tensor, eligible: Tensor | None = None) -> Tensor:
    mask = _fake(scores, counts, eligible)
    if mask.numel() == 0:
        return mask
    if backend_of("column_mask", scores) == "torch":
        return reference.column_mask(scores.detach(), counts, eligible)
    columns = scores.shape[-1]
    flat, flat_counts = scores.detach().contiguous(), counts.contiguous()
    flat_eligible = None if eligible is None else eligible.contiguous()
    arguments = (
        flat.data_ptr(), 0 if flat_eligible is None else flat_eligible.data_ptr(), flat_counts.data_ptr(),
        mask.data_ptr(), flat.numel() // columns, columns,
    )  # fmt: skip
    if on_cuda(flat):
        with device_of(flat):
            _C.cuda.column_mask(*arguments, stream_of(flat))
    else:
        use_torch_threads()
        _C.cpu.column_mask(*arguments)
    return mask


def _fake(scores: Tensor, counts: Tensor, eligible: Tensor | None = None) -> Tensor:
    check_tensor("scores", scores, "[..., columns]", None, (torch.float32, torch.float64))
    check_tensor("count", counts, str(list(scores.shape[:-1])), scores.dim() - 1, (torch.int64,))
    check_shape("count", counts, tuple(scores.shape[:-1]), "like the leading dimensions of scores")
    check_same("count", counts, "scores", scores, dtype=False)
    if eligible is not None:
        check_tensor("eligible", eligible, "[..., columns]", scores.dim(), (torch.bool,))
        check_shape("eligible", eligible, tuple(scores.shape), "like scores")
        check_same("eligible", eligible, "scores", scores, dtype=False)
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


register("column_mask(Tensor scores, Tensor counts, Tensor? eligible=None) -> Tensor", _column_mask, _fake)
