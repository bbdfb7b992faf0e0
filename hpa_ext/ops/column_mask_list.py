"""column_mask for a list of layers, whose numbers of columns and counts may all differ: one launch on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import backend_of, device_of, is_traced, on_cuda, stream_of, use_torch_threads
from hpa_ext.ops._checks import check_same, check_shape, check_tensor, describe
from hpa_ext.ops._library import register
from hpa_ext.ops._lists import as_list, check_one_device


def column_mask_list(
    scores: Sequence[Tensor], counts: Sequence[int | Tensor], eligible: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Mark exactly ``counts[l]`` of the highest scores of each layer: `column_mask` for each.

    Args:
        scores: for each layer ``[columns_l]`` float32 (float64 through torch: all layers or none), on one device.
        counts: for each layer how many to mark: an int, which needs no memory on the device, or int64 ``[]`` on the
            device of the scores. Clamped to [0, eligible columns].
        eligible: for each layer bool ``[columns_l]``, or None: all. None instead of the list: all of every layer.

    Returns:
        For each layer bool ``[columns_l]``, True at the marked columns.

    Raises:
        TypeError, ValueError: no lists of one length, or a layer is not as above, or a negative int count; the message
            gives the layer's number.

    Ties go to the lower index, -0 equals +0, and NaN ranks below every number.
    """
    scores = as_list("scores", scores)
    counts = as_list("counts", counts, len(scores), "scores")
    eligible = [None] * len(scores) if eligible is None else as_list("eligible", eligible, len(scores), "scores")
    for i, entry in enumerate(scores):
        check_tensor(f"scores[{i}]", entry, "[columns]", 1, (torch.float32, torch.float64))
    numbers = [_number(i, count, len_of) for i, (count, len_of) in enumerate(zip(counts, scores, strict=True))]
    tensors = [count if isinstance(count, Tensor) else None for count in counts]
    if scores and is_traced(*scores, *tensors, *eligible):
        return torch.ops.hpa_ext.column_mask_list([s.detach() for s in scores], numbers, tensors, eligible)
    return _column_mask_list(scores, numbers, tensors, eligible)


def _number(layer: int, count: int | Tensor, scores: Tensor) -> int:
    """The count as int64 can hold it; 0 where it is a tensor."""
    if isinstance(count, Tensor):
        return 0
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"counts[{layer}]: expected an int or an int64 tensor [], got {describe(count)}")
    if isinstance(count, int):
        if count < 0:
            raise ValueError(f"counts[{layer}]: expected at least 0, got {count}")
        return min(count, scores.shape[0])
    return count


def _column_mask_list(
    scores: list[Tensor], numbers: list[int], counts: list[Tensor | None], eligible: list[Tensor | None]
) -> list[Tensor]:
    masks = _fake(scores, numbers, counts, eligible)
    if not scores:
        return masks
    if backend_of("column_mask", scores[0]) == "torch":
        return [
            reference.column_mask(
                s.detach(), torch.full((), n, dtype=torch.int64, device=s.device) if count is None else count, e
            )
            for s, n, count, e in zip(scores, numbers, counts, eligible, strict=True)
        ]
    flat = [s.detach().contiguous() for s in scores]
    flat_eligible = [None if e is None else e.contiguous() for e in eligible]
    items = [
        (
            s.data_ptr(), 0 if e is None else e.data_ptr(), 0 if count is None else count.data_ptr(), n,
            mask.data_ptr(), 1, s.shape[0],
        )
        for s, e, count, n, mask in zip(flat, flat_eligible, counts, numbers, masks, strict=True)
    ]  # fmt: skip
    if on_cuda(flat[0]):
        with device_of(flat[0]):
            _C.cuda.column_mask_list(items, stream_of(flat[0]))
    else:
        use_torch_threads()
        _C.cpu.column_mask_list(items)
    return masks


def _fake(
    scores: list[Tensor], numbers: list[int], counts: list[Tensor | None], eligible: list[Tensor | None]
) -> list[Tensor]:
    as_list("numbers", numbers, len(scores), "scores")
    as_list("counts", counts, len(scores), "scores")
    as_list("eligible", eligible, len(scores), "scores")
    for i, (s, count, e) in enumerate(zip(scores, counts, eligible, strict=True)):
        check_tensor(f"scores[{i}]", s, "[columns]", 1, (torch.float32, torch.float64))
        if count is not None:
            check_tensor(f"counts[{i}]", count, "[]", 0, (torch.int64,))
            check_same(f"counts[{i}]", count, f"scores[{i}]", s, dtype=False)
        if e is not None:
            check_tensor(f"eligible[{i}]", e, "[columns]", 1, (torch.bool,))
            check_shape(f"eligible[{i}]", e, tuple(s.shape), f"like scores[{i}]")
            check_same(f"eligible[{i}]", e, f"scores[{i}]", s, dtype=False)
    check_one_device("scores", scores)
    return [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]


register(
    "column_mask_list(Tensor[] scores, SymInt[] numbers, Tensor?[] counts, Tensor?[] eligible) -> Tensor[]",
    _column_mask_list,
    _fake,
)
