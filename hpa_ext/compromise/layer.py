"""The compromise on one layer in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.lora_update import LoraUpdate, Step, apply_steps
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import FullGram, check_sides, read_full_grams
from hpa_ext.compromise.report import CompromiseLayerReport
from hpa_ext.compromise.solution import Compromise, UpdateRows
from hpa_ext.errors import NumericalError
from hpa_ext.gram import GramPair
from hpa_ext.hpa.layer import weight_of
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.models.sharding import is_sharded
from hpa_ext.models.structure import is_conv1d
from hpa_ext.ops._checks import check_weight_pair, describe


def harmonize(
    layer_old: Tensor | nn.Module,
    layer_new: Tensor | nn.Module,
    gram: GramPair | tuple[FullGram, FullGram],
    depth: float = 0.5,
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[FullGram] = (),
    return_report: bool = False,
) -> Tensor | tuple[Tensor, CompromiseLayerReport]:
    """The weight between a layer before and after a tuning step whose outputs change least on the safety set.

    Args:
        layer_old, layer_new: a weight ``[out, in]`` (bfloat16, float16, float32, float64), an ``nn.Linear``, or a
            transformers ``Conv1D`` (whose weight is ``[in, out]``, and so is the result). Neither is changed.
        gram: a `GramPair` or ``(safety, task)``, each a `Gram` or its matrix ``[in, in]``, on the weights' device.
        depth: layer / number of layers; has no part in the compromise.
        config: settings; None for the defaults.
        earlier: Grams of the layer's input on earlier tasks' samples, protected by ``config.earlier_strength``.
        return_report: also return a `CompromiseLayerReport`.

    Returns:
        A new tensor of the shape, dtype and device of layer_new's weight; with the report if asked for.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device; a `GramDiagonal`; a DTensor.
        NumericalError: a weight or Gram holds NaN or Inf, the Grams cannot be factored, no strength holds the budget.

    ``W_old + D H_t (H_t + mu H_s)^-1`` is computed in float32 (float64 for float64 weights or matrices) and rounded
    once. Synchronises with a device. Source: RegMean (Jin et al., ICLR 2023) with one Gram on each side.
    """
    config = checked_config(config)
    old, new = weight_of("layer_old", layer_old), weight_of("layer_new", layer_new)
    merged, report = merge(old, new, gram, config, earlier=earlier)
    merged = merged.mT.contiguous() if is_conv1d(layer_new) else merged
    return (merged, report) if return_report else merged


def harmonize_(
    layer_old: Tensor | nn.Module,
    layer_new: Tensor | nn.Module,
    gram: GramPair | tuple[FullGram, FullGram],
    depth: float = 0.5,
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[FullGram] = (),
) -> CompromiseLayerReport:
    """As `harmonize`, written into layer_new; returns the report. If anything raises, layer_new is unchanged."""
    config = checked_config(config)
    old, new = weight_of("layer_old", layer_old), weight_of("layer_new", layer_new)
    if not is_sharded(new) and old.data_ptr() == new.data_ptr() and old.numel() > 0:
        raise ValueError("layer_new: is the same memory as layer_old, so the weight before tuning is lost")
    merged, report = merge(old, new, gram, config, earlier=earlier)
    new.copy_(merged)
    return report


@dataclass
class LastInput:
    """The Grams that were used last, and their factor: linears in a row often share an input (q, k and v)."""

    key: tuple[Any, ...] = ()
    compromise: Compromise | None = None

    def of(
        self, gram: tuple[FullGram, FullGram], earlier: Sequence[FullGram], old: Tensor, config: CompromiseConfig
    ) -> Compromise:
        """The solver for these Grams and a weight ``[out, in]``."""
        float64 = old.dtype == torch.float64
        objects = (*gram, *earlier, config)
        settings = (old.shape[1], old.device, float64)
        same = len(self.key) == len(objects) + 1 and all(a is b for a, b in zip(self.key, objects, strict=False))
        if self.compromise is None or not same or self.key[-1] != settings:
            self.compromise = None
            grams = read_full_grams(gram, old.shape[1], old.device, earlier=earlier, float64=float64)
            self.key, self.compromise = (*objects, settings), Compromise(grams, config)
        return self.compromise


def merge(
    old: Tensor,
    new: Tensor,
    gram: GramPair | tuple[FullGram, FullGram],
    config: CompromiseConfig,
    *,
    earlier: Sequence[FullGram] = (),
    name: str | None = None,
    last: LastInput | None = None,
) -> tuple[Tensor, CompromiseLayerReport]:
    """The compromise of two weights ``[out, in]`` in new's dtype, and the report; see `harmonize`.

    Args:
        last: keeps what the next weight with the same input can use.
    """
    refuse_sharded("layer_old", old)
    refuse_sharded("layer_new", new)
    check_weight_pair(old, new)
    check_sides(gram, earlier)
    compromise = (last or LastInput()).of(gram, earlier, old, config)
    return merge_with(compromise, old, new, len(earlier), name)


def merge_with(
    compromise: Compromise, old: Tensor, new: Tensor, earlier_count: int, name: str | None
) -> tuple[Tensor, CompromiseLayerReport]:
    """As `merge`, for Grams that are read already."""
    dtype = torch.float64 if old.dtype == torch.float64 else torch.float32
    update = new.to(dtype) - old.to(dtype)
    _check_finite(old, new, update)
    solution = compromise.solve(UpdateRows(update))
    kept = solution.rows
    # The very bits of the tuned, or of the old weight where one of them is the answer.
    if kept is update:
        merged = new.clone(memory_format=torch.contiguous_format)
    elif solution.strength == float("inf"):
        merged = old.clone(memory_format=torch.contiguous_format)
    else:
        merged = (old.to(kept.dtype) + kept).to(new.dtype)
    return merged, CompromiseLayerReport.of(name, solution, compromise, earlier_count)


def merge_lora(
    compromise: Compromise, old: Tensor, lora: tuple[Tensor, Tensor, float], earlier_count: int, name: str | None
) -> tuple[Tensor, CompromiseLayerReport]:
    """The compromise of an update ``scaling * b @ a`` of `old` ``[out, in]``, merged, and the report.

    Args:
        lora: a ``[r, in]``, b ``[out, r]`` and the scaling, on the device of `old`. The new a is rounded to the dtype
            of a before it is merged, so that the weight is that of the harmonized adapter.

    Raises NumericalError for NaN or Inf in `old`, a or b, and as `Compromise.solve`.
    """
    a, b, scaling = lora
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (old, a, b)):
        LowRankUpdate(old, a, b, scaling).raise_not_finite()
    solution = compromise.solve(UpdateRows.of_lora(a, b, scaling))
    kept = LoraUpdate(solution.rows.to(a.dtype), b, scaling)
    merged = apply_steps(old, [Step(None, kept)])
    return merged, CompromiseLayerReport.of(name, solution, compromise, earlier_count)


def checked_config(config: CompromiseConfig | None) -> CompromiseConfig:
    """The settings, the defaults for None; TypeError for anything else."""
    if config is None:
        return CompromiseConfig()
    if not isinstance(config, CompromiseConfig):
        raise TypeError(f"config: expected a CompromiseConfig, got {describe(config)}")
    return config


def refuse_sharded(name: str, weight: Tensor) -> None:
    """Raise ValueError for a DTensor: the solution mixes all columns of a row, and none of them is gathered here."""
    if is_sharded(weight):
        raise ValueError(
            f"{name}: the compromise does not take DTensors; harmonize the adapter (hpa_ext.harmonize_adapter) or the "
            "checkpoint (hpa_ext.harmonize_checkpoint), or pass full_tensor()"
        )


def _check_finite(old: Tensor, new: Tensor, update: Tensor) -> None:
    if bool(torch.isfinite(update).all()):
        return
    for name, weight in (("layer_old", old), ("layer_new", new)):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise NumericalError(f"{name}: the weight {list(weight.shape)} holds {bad} NaN or Inf", failing_minor=-1)
    raise NumericalError("the weights are too large: their difference overflows float32")
