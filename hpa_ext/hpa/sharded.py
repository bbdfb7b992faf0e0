"""HPA on weights that are divided among processes as DTensors: each process works on its own rows and columns.

A layer takes one all-reduce of a vector and two scalars; output granularity takes one more. No full weight is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.agreement import ElsewhereError
from hpa_ext.errors import NumericalError
from hpa_ext.hpa.groups import served_together
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate
from hpa_ext.models.sharding import (
    check_alike,
    from_local,
    is_sharded,
    local,
    mesh_device,
    part_of,
    sharding_groups,
)
from hpa_ext.ops._checks import check_weight_pair


@dataclass(frozen=True)
class ShardedUpdate:
    """Both weights as DTensors ``[out, in]`` with the same mesh and placements: Shard(0), Shard(1) and Replicate.

    Parts are added over the sharded dimensions of the mesh only, so a replicated one (HSDP) costs nothing. The sums
    of the parts are float32 (as everywhere) and are added in float64, so that every process rounds to the same numbers.
    """

    old: Tensor
    new: Tensor

    def __post_init__(self) -> None:
        check_alike("layer_old", self.old, "layer_new", self.new)
        check_weight_pair(self.old, self.new)  # of the whole weights: a process without rows would see no difference

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the whole weight."""
        return tuple(self.old.shape)

    @property
    def device(self) -> torch.device:
        """Of this process's part."""
        return local(self.old).device

    @property
    def part(self) -> DenseUpdate:
        """The rows and columns of this process."""
        return DenseUpdate(local(self.old), local(self.new))

    def column_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `WeightUpdate`: one all-reduce."""
        columns = part_of(self.new)[1]
        squared_update, *scalars = self.part.column_sums()
        total = torch.zeros(self.shape[1] + 2, dtype=torch.float64, device=squared_update.device)
        total[columns] = squared_update.double()
        total[-2:] = torch.stack(scalars).double()
        total = self._add_up(total).to(squared_update.dtype)
        return total[:-2].contiguous(), total[-2].clone(), total[-1].clone()

    def row_sums(self, column_weights: list[Tensor]) -> list[Tensor]:
        """See `WeightUpdate`: one all-reduce."""
        rows, columns = part_of(self.new)
        parts = self.part.row_sums([weight[columns] for weight in column_weights])
        total = torch.zeros((len(parts), self.shape[0]), dtype=torch.float64, device=self.device)
        for index, part in enumerate(parts):
            total[index, rows] = part.double()
        return list(self._add_up(total).to(column_weights[0].dtype).unbind())

    def raise_not_finite(self) -> None:
        """See `WeightUpdate`; no exchange: a process whose own part is sound says that another's is not."""
        process = torch.distributed.get_rank()
        for name, weight in (("layer_old", self.part.old), ("layer_new", self.part.new)):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise NumericalError(
                    f"{name}: the part {list(weight.shape)} of process {process} holds {bad} NaN or Inf"
                )
        raise ElsewhereError("the weights are too large: their squares overflow float32")

    def backend(self) -> dict[str, str]:
        """See `WeightUpdate`."""
        return self.part.backend()

    def _add_up(self, total: Tensor) -> Tensor:
        device = mesh_device(self.new.device_mesh)
        sent = total.to(device)
        for group in sharding_groups(self.new):
            torch.distributed.all_reduce(sent, group=group)
        return sent.to(total.device)


def update_of(old: Tensor, new: Tensor) -> WeightUpdate:
    """The update between two weights, plain or divided alike; ValueError for one of each."""
    return ShardedUpdate(old, new) if is_sharded(old) or is_sharded(new) else DenseUpdate(old, new)


def merge_weights(
    olds: Sequence[Tensor],
    news: Sequence[Tensor],
    retained: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    outs: Sequence[Tensor] | None = None,
    *,
    axis: str = "input",
) -> list[Tensor]:
    """``ops.project_merge_list``, of DTensors each process's own part.

    Each of `retained` is for the whole weight, on all processes.
    """
    masks = list(retained)
    for index, new in enumerate(news):
        if is_sharded(new):
            rows, columns = part_of(new)
            masks[index] = masks[index][columns if axis == "input" else rows]
    old_parts, new_parts = [local(old) for old in olds], [local(new) for new in news]
    out_parts = None if outs is None else [local(out) for out in outs]
    merged: list[Tensor | None] = [None] * len(new_parts)
    for together in served_together(new_parts):
        found = ops.project_merge_list(
            [old_parts[i] for i in together],
            [new_parts[i] for i in together],
            [masks[i] for i in together],
            torch.stack([coefficients[i] for i in together]),
            None if out_parts is None else [out_parts[i] for i in together],
            axis=axis,
        )
        for index, weight in zip(together, found, strict=True):
            merged[index] = from_local(weight, news[index]) if is_sharded(news[index]) else weight
    return merged if outs is None else list(outs)
