"""low_rank: scores and merge of a LoRA update from its factors; neither the update nor the new weight is formed."""

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
    workspace,
)
from hpa_ext.ops._checks import (
    WEIGHT_DTYPES,
    as_coefficient,
    check_tensor,
)
from hpa_ext.ops._library import register
from hpa_ext.ops._low_rank_checks import as_scaling, check_add, check_factors, check_merge

LOW_RANK_DTYPES = WEIGHT_DTYPES
"""What a weight, A and B may be stored in; float64 of any of them is served by torch."""


def low_rank_scores(w_old: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `column_scores` for the update ``D = scaling * b @ a``, which is never in memory.

    Args:
        w_old: ``[out, in]`` bfloat16, float16 or float32 (float64 through torch), any strides.
        a: ``[r, in]``, LoRA's A; bfloat16, float16, float32 or float64, whatever the dtype of `w_old`.
        b: ``[out, r]``, LoRA's B, likewise. r may be 0.
        scaling: what LoRA multiplies ``B A`` with.

    Returns:
        squared_update: ``[in]``, ``sum_i D_ij^2`` (a sum over rows, not a mean).
        inner_product: ``[]``, ``<D, w_old>_F``.
        old_squared_norm: ``[]``, ``||w_old||_F^2``.
        All float32 (float64 for float64 weights), on the device of the weight.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument.

    The weight is read once. On the CPU each ``D_ij`` is a float32 sum over the rank, and the sums over it run in an
    order that does not depend on the thread count. Numerators of HPA's scores (CVPR 2026, section 3.1) and of its
    projection (3.3). Not differentiable.
    """
    scaling = as_scaling(scaling)
    if is_traced(w_old, a, b):
        return torch.ops.hpa_ext.low_rank_scores(w_old.detach(), a.detach(), b.detach(), scaling)
    return _low_rank_scores(w_old, a, b, scaling)


def low_rank_merge(
    w_old: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    mask: Tensor,
    coefficient: float | Tensor,
    out: Tensor | None = None,
    *,
    axis: str = "input",
) -> Tensor:
    """``M * w_old + (1 - M) * (w_old * (1 - coefficient) + scaling * b @ a)``, M being 1 on the retained columns.

    Args:
        w_old, a, b, scaling: as for `low_rank_scores`.
        mask: bool ``[in]``, True on the input columns to retain; with ``axis="output"`` bool ``[out]``, on the rows.
        coefficient: a number, or a tensor of one element on the device of the weight, as for `project_merge`.
        out: where to write, like `w_old` in shape, dtype and device; may be `w_old` itself. A tensor that overlaps an
            argument otherwise gives an undefined result. None: a new contiguous tensor.
        axis: "input" or "output", the dimension of the mask.

    Returns:
        `out`. Retained elements are bit-identical to `w_old`; the others are computed in float32 (float64 for float64
        weights) and rounded once, to nearest even. They have the bits of `low_rank_add` with the gain
        ``1 - coefficient``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument. `out` is then unchanged.

    The weight is read once, and the result written once. HPA (CVPR 2026), section 3.3. Not differentiable.
    """
    scaling = as_scaling(scaling)
    check_tensor("w_old", w_old, "[out, in]", 2, WEIGHT_DTYPES)  # the coefficient takes its dtype and device from it
    coefficient = as_coefficient(coefficient, w_old)
    if is_traced(w_old, a, b, mask, coefficient, out):
        arguments = (w_old.detach(), a.detach(), b.detach(), scaling, mask, coefficient, axis)
        if out is None:
            return torch.ops.hpa_ext.low_rank_merge(*arguments)
        torch.ops.hpa_ext.low_rank_merge_out(*arguments, out.detach())
        return out
    if out is None:
        return _low_rank_merge(w_old, a, b, scaling, mask, coefficient, axis)
    _low_rank_merge_out(w_old, a, b, scaling, mask, coefficient, axis, out)
    return out


def low_rank_add(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gain: Tensor | None = None,
    out: Tensor | None = None,
    *,
    axis: str = "input",
) -> Tensor:
    """``weight * gain + scaling * b @ a``: what a plain adapter, or a harmonized one with its gain, merges to.

    Args:
        weight: ``[out, in]`` bfloat16, float16 or float32 (float64 through torch), any strides.
        a, b, scaling: as for `low_rank_scores`.
        gain: float32 (float64 for a float64 weight) ``[in]``, one factor per input column; with ``axis="output"``
            ``[out]``, per row. None: 1.
        out: where to write, like `weight` in shape, dtype and device; may be `weight` itself. None: a new contiguous
            tensor.
        axis: "input" or "output", the dimension of the gain.

    Returns:
        `out`, computed in float32 (float64 for a float64 weight) and rounded once, to nearest even.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument. `out` is then unchanged.

    Not differentiable.
    """
    scaling = as_scaling(scaling)
    check_tensor("weight", weight, "[out, in]", 2, WEIGHT_DTYPES)  # the result takes its shape from it
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if is_traced(weight, a, b, gain, out):
        gain = None if gain is None else gain.detach()
        torch.ops.hpa_ext.low_rank_add_out(weight.detach(), a.detach(), b.detach(), scaling, gain, axis, out.detach())
        return out
    _low_rank_add_out(weight, a, b, scaling, gain, axis, out)
    return out


def low_rank_backend(w_old: Tensor, a: Tensor, b: Tensor) -> str:
    """What serves these operations for tensors of these dtypes on this device: "native" or "torch"."""
    native = all(backend_of("low_rank", t) == "native" for t in (w_old, a, b))
    return "native" if native else "torch"


class _Native:
    """A weight, the factors and the place of the result as the native module takes them.

    A weight whose columns lie together (Conv1D, embeddings) is taken as its transpose, with the axes exchanged and
    ``D^T = scaling * a^T b^T``. Each element of D is the same sum either way.
    """

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float, out: Tensor | None = None) -> None:
        weight, a, b = weight.detach(), a.detach(), b.detach()
        self.out = None if out is None else out.detach()
        self.exchanged = weight.stride(0) == 1 and weight.stride(1) != 1 and min(weight.shape) > 1
        if self.exchanged:
            weight, a, b = weight.mT, b.mT, a.mT
        # The native module takes adjacent columns; what has to be copied for that is alive as long as this object.
        self.weight, self.a, self.b = unit_stride(weight), unit_stride(a), unit_stride(b)
        factors = [(t.data_ptr(), DTYPE_TAGS[t.dtype], row_stride(t)) for t in (self.a, self.b)]
        self.update = (DTYPE_TAGS[weight.dtype], *weight.shape, *factors, self.a.shape[0], scaling)
        self.source = (self.weight.data_ptr(), row_stride(self.weight))
        self.on_cuda = on_cuda(self.weight)
        if self.out is not None:
            place = self.out.mT if self.exchanged else self.out
            self._target = unit_stride(place)
            self._in_place = self._target is place
            if not self._in_place:
                self._target = torch.empty_like(place, memory_format=torch.contiguous_format)
            self.destination = (self._target.data_ptr(), row_stride(self._target))

    def call(self, name: str, *arguments: object) -> None:
        """The native operation of this name on the device of the weight."""
        if self.on_cuda:
            with device_of(self.weight):
                getattr(_C.cuda, name)(*arguments, stream_of(self.weight))
        else:
            use_torch_threads()
            getattr(_C.cpu, name)(*arguments, 0)

    def rows_of(self, axis: str) -> bool:
        """Whether `axis` of the weight runs along the rows that the native module sees."""
        return (axis == "output") != self.exchanged

    def written(self) -> None:
        """The result is in `out` from now on."""
        if self._in_place:
            mark_written(self.out)
        else:
            (self.out.mT if self.exchanged else self.out).copy_(self._target)


def _low_rank_scores(w_old: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    squared_update, inner_product, old_squared_norm = _fake_scores(w_old, a, b, scaling)
    if low_rank_backend(w_old, a, b) == "torch":
        return reference.low_rank_scores(w_old.detach(), a.detach(), b.detach(), scaling)
    # Sums over the rows of each column: a transposed weight is copied.
    native = _Native(unit_stride(w_old.detach()), a, b, scaling)
    scratch = None
    if native.on_cuda:
        scratch = workspace(_C.cuda.low_rank_scores_workspace_bytes(*native.weight.shape), native.weight)
    native.call(
        "low_rank_scores", *native.source, *native.update,
        squared_update.data_ptr(), inner_product.data_ptr(), old_squared_norm.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
    )  # fmt: skip
    return squared_update, inner_product, old_squared_norm


def _fake_scores(w_old: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    check_factors("w_old", w_old, a, b)
    dtype, device = reference.compute_dtype(w_old), w_old.device
    column = torch.empty(w_old.shape[1], dtype=dtype, device=device)
    return column, torch.empty((), dtype=dtype, device=device), torch.empty((), dtype=dtype, device=device)


def _low_rank_merge(
    w_old: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor, coefficient: Tensor, axis: str
) -> Tensor:
    out = torch.empty(w_old.shape, dtype=w_old.dtype, device=w_old.device)
    _low_rank_merge_out(w_old, a, b, scaling, mask, coefficient, axis, out)
    return out


def _fake_merge(
    w_old: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor, coefficient: Tensor, axis: str
) -> Tensor:
    out = torch.empty(w_old.shape, dtype=w_old.dtype, device=w_old.device)
    check_merge(w_old, a, b, scaling, mask, coefficient, axis, out)
    return out


def _low_rank_merge_out(
    w_old: Tensor, a: Tensor, b: Tensor, scaling: float, mask: Tensor, coefficient: Tensor, axis: str, out: Tensor
) -> None:
    check_merge(w_old, a, b, scaling, mask, coefficient, axis, out)
    if out.numel() == 0:
        return
    if low_rank_backend(w_old, a, b) == "torch":
        reference.low_rank_merge(
            w_old.detach(), a.detach(), b.detach(), scaling, mask, coefficient, out.detach(), axis=axis
        )
        return
    native = _Native(w_old, a, b, scaling, out)
    mask = mask.contiguous()
    native.call(
        "low_rank_merge", *native.source, *native.destination, *native.update,
        mask.data_ptr(), native.rows_of(axis), coefficient.data_ptr(),
    )  # fmt: skip
    native.written()


def _low_rank_add_out(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, gain: Tensor | None, axis: str, out: Tensor
) -> None:
    check_add(weight, a, b, scaling, gain, axis, out)
    if out.numel() == 0:
        return
    if low_rank_backend(weight, a, b) == "torch":
        gain = None if gain is None else gain.detach()
        reference.low_rank_add(weight.detach(), a.detach(), b.detach(), scaling, gain, out.detach(), axis=axis)
        return
    native = _Native(weight, a, b, scaling, out)
    gain = None if gain is None else gain.detach().contiguous()
    native.call(
        "low_rank_add", *native.source, *native.destination, *native.update,
        0 if gain is None else gain.data_ptr(), native.rows_of(axis),
    )  # fmt: skip
    native.written()


register(
    "low_rank_scores(Tensor w_old, Tensor a, Tensor b, float scaling) -> (Tensor, Tensor, Tensor)",
    _low_rank_scores,
    _fake_scores,
)
register(
    "low_rank_merge(Tensor w_old, Tensor a, Tensor b, float scaling, Tensor mask, Tensor coefficient, str axis)"
    " -> Tensor",
    _low_rank_merge,
    _fake_merge,
)
register(
    "low_rank_merge_out(Tensor w_old, Tensor a, Tensor b, float scaling, Tensor mask, Tensor coefficient, str axis,"
    " Tensor(a!) out) -> ()",
    _low_rank_merge_out,
    check_merge,
)
register(
    "low_rank_add_out(Tensor weight, Tensor a, Tensor b, float scaling, Tensor? gain, str axis, Tensor(a!) out) -> ()",
    _low_rank_add_out,
    check_add,
)
