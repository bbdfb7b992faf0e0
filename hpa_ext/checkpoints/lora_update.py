"""What a LoRA adapter does to one stored weight, and the sum with it, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops

# In float32 64 MiB: large enough for a matrix product, small beside the weight of an embedding.
_ELEMENTS_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class LoraUpdate:
    """The update ``scaling * b @ a`` of a linear weight ``[out, in]``.

    Attributes:
        a: ``[r, in]``, b: ``[out, r]``, any floating dtype. For an embedding, in is the number of tokens and out the
            width.
        scaling: alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA.
        magnitude: ``[out]`` of DoRA, None for plain LoRA.
        b_bias: ``[out]``, what ``lora_bias`` adds to the layer's bias after scaling; None without.
        transposed: whether the layer stores its weight as ``[in, out]`` (Conv1D, embeddings).
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    b_bias: Tensor | None = None
    transposed: bool = False

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scaling * b @ a``, ``[out, in]``, whatever the layout of the stored weight; without DoRA's magnitude."""
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.scaling

    def added_to(self, weight: Tensor, rows: slice = slice(None), gain: Tensor | None = None) -> Tensor:
        """The tuned weight, for some rows of the stored one.

        Args:
            weight: those rows of the weight as stored, float32 or float64; may be overwritten.
            rows: which ones they are. All of them for DoRA on a transposed layer, whose norms need whole columns.
            gain: ``[in]``, what the input columns of the whole weight are multiplied with first, or None.

        DoRA: ``magnitude * (W + s B A) / row norm of (W + s B A)`` (Liu et al., ICML 2024, equation 5), as PEFT merges.
        """
        self._add(weight, weight, rows, gain)
        if self.magnitude is not None:
            magnitude = self.magnitude.to(weight.dtype)
            if self.transposed:
                weight = magnitude / torch.linalg.norm(weight.mT, dim=1) * weight
            else:
                weight = (magnitude[rows] / torch.linalg.norm(weight, dim=1))[:, None] * weight
        return weight

    def merged(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """The whole stored weight after a step without magnitude, in a new tensor, rounded once to its dtype."""
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self._add(weight, result, slice(None), gain)
        return result

    def _add(self, weight: Tensor, out: Tensor, rows: slice, gain: Tensor | None) -> None:
        # One operation for all ways to merge, and every element's sum in the same order: so an adapter merges to the
        # same bits whole or in pieces, and to those of `LowRankUpdate.merge`.
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = (t if t.dtype in ops.LOW_RANK_DTYPES else t.to(wide) for t in (self.a, self.b))
        gain = None if gain is None else gain.to(wide)
        if self.transposed:
            a, gain = a[:, rows], None if gain is None else gain[rows]
            weight, out = weight.mT, out.mT
        else:
            b = b[rows]
        ops.low_rank_add(weight, a, b, self.scaling, gain, out)


@dataclass(frozen=True)
class Step:
    """One adapter's part in a weight: ``W <- W diag(gain)``, then the update on top.

    Attributes:
        gain: float32 ``[in]``, one factor per input column, or None.
        update: or None.
    """

    gain: Tensor | None
    update: LoraUpdate | None


def apply_steps(weight: Tensor, steps: Sequence[Step], *, transposed: bool = False) -> Tensor:
    """The stored weight after the steps, in order, in its dtype.

    Args:
        weight: as stored, ``[out, in]`` or transposed ``[in, out]``; not changed.
        steps: their updates must have the layout that `transposed` says.
        transposed: whether the rows of the stored weight are input columns.

    Everything is summed in float32 (float64 for a float64 weight) and rounded once, at the end. Works on some rows at a
    time, so that the temporaries of a large embedding stay small.
    """
    if not steps:
        return weight
    if weight.dtype in ops.LOW_RANK_DTYPES and len(steps) == 1 and _is_one_sum(steps[0]):
        return steps[0].update.merged(weight, steps[0].gain)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    whole = transposed and any(step.update is not None and step.update.magnitude is not None for step in steps)
    count = weight.shape[0] if whole else max(1, _ELEMENTS_AT_A_TIME // max(1, weight[:1].numel()))
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, weight.shape[0], max(1, count)):
        rows = slice(start, start + count)
        total = weight[rows].to(dtype, copy=True)
        for step in steps:
            if step.update is not None:
                total = step.update.added_to(total, rows, step.gain)
            elif step.gain is not None:
                gain = step.gain.to(dtype)
                total.mul_(gain[rows, None] if transposed else gain)
        result[rows] = total
    return result


def _is_one_sum(step: Step) -> bool:
    return step.update is not None and step.update.magnitude is None
