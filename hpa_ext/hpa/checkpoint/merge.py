"""Second phase: every tensor of the output, read, harmonized or copied, and written, in the order of the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.buffers import Buffers, Row
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.bundles import Bundle, bundles
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.keeper import Keeper
from hpa_ext.hpa.checkpoint.pieces import Piece, Unit
from hpa_ext.hpa.checkpoint.pipeline import run_pipeline
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.layer_plan import LayerPlan, merge_updates
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.naming import naming
from hpa_ext.hpa.plan import plan_updates
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate

Diagonals = Mapping[str, Mapping[str, GramDiagonal]]


@dataclass
class MergeRun:
    """The second phase of one process.

    Attributes:
        reduced: see `Work`.
        reports: of the units that were finished in this run, by module.
    """

    job: Job
    writer: ShardedWriter
    keeper: Keeper
    reduced: Any
    device: torch.device
    progress: Progress
    reports: dict[str, Any] = field(default_factory=dict)
    _buffers: Buffers = field(default_factory=Buffers)

    def run(self, units: Sequence[Unit]) -> None:
        """Make these units."""
        run_pipeline(bundles(units), self._read, self._compute, self._write)

    def _read(self, bundle: Bundle) -> list[WeightUpdate | Tensor]:
        if bundle.is_merged:
            # Old weights are released after they have served, the new ones' memory when the result is written.
            olds, news = (Row(self._buffers, [piece.nbytes for piece in bundle.pieces]) for _ in range(2))
            return [self.job.weight_update(piece.module, olds, news) for piece in bundle.pieces]
        return [self._read_piece(piece) for piece in bundle.pieces]

    def _read_piece(self, piece: Piece) -> Tensor:
        if piece.kind == "update":
            return self.job.new.tensor(self.job.new.canonical_name[piece.entry.name])
        copied = self._buffers.take([piece.nbytes], torch.uint8)
        self.job.source.read_into(piece.entry, piece.offset, memoryview(copied.numpy()))
        return copied

    def _compute(self, bundle: Bundle, read: list[WeightUpdate | Tensor]) -> list[Tensor]:
        self.progress.show(bundle.unit.label)
        if not bundle.is_merged:
            return read
        modules = [piece.module for piece in bundle.pieces]
        updates = [moved(update, self.device) for update in read]
        found = self.job.method.merge(self.job, self.reduced, modules, updates)
        made = []
        for module, update, (weight, report) in zip(modules, read, found, strict=True):
            self.reports[module] = report
            merged = weight.cpu()
            kept = merged.untyped_storage().data_ptr()
            self._buffers.release(*(t for t in tensors_of(update) if t.untyped_storage().data_ptr() != kept))
            made.append(merged.mT if self.job.linears[module].is_transposed else merged)
        return made

    def _write(self, bundle: Bundle, made: list[Tensor]) -> None:
        for piece, tensor in zip(bundle.pieces, made, strict=True):
            if piece.kind == "copy":
                self.writer.write_bytes(piece.entry.name, piece.offset, memoryview(tensor.numpy()))
            else:
                self.writer.write(piece.entry.name, tensor)
            self._buffers.release(tensor)
        if bundle.is_last:
            self.keeper.finished(bundle.unit, {"layers": self._records(bundle.unit)})
        self.progress.advance(bundle.nbytes)

    def _records(self, unit: Unit) -> list[dict]:
        """The reports of a unit's modules, for the journal."""
        modules = dict.fromkeys(piece.module for piece in unit.pieces if piece.module is not None)
        return [self.job.method.record(self.reports[module]) for module in modules]


def plan_modules(
    job: Job, diagonals: Diagonals, modules: Sequence[str], updates: Sequence[WeightUpdate]
) -> list[LayerPlan]:
    """Score and select for some modules together; errors name the module."""
    pairs = [
        GramPair(*(diagonals[name][module].to(update.device) for name in ("safety", "task")))
        for module, update in zip(modules, updates, strict=True)
    ]
    depths = [job.depths[module] for module in modules]
    return plan_updates(updates, pairs, depths, job.config, naming=lambda index: naming(modules[index]))


def merged_weights(plans: Sequence[LayerPlan], updates: Sequence[WeightUpdate]) -> list[Tensor]:
    """The harmonized weights ``[out, in]``, in the place of the new ones, or of the old ones where there are no new."""
    outs = [update.old if isinstance(update, LowRankUpdate) else update.new for update in updates]
    merge_updates(plans, updates, outs)
    return outs


def tensors_of(update: WeightUpdate) -> list[Tensor]:
    """The tensors that an update consists of."""
    if isinstance(update, LowRankUpdate):
        return [update.old, update.a, update.b]
    return [update.old, update.new]


def moved(update: WeightUpdate, device: torch.device) -> WeightUpdate:
    """The update on a device."""
    if update.device == device:
        return update
    tensors = [tensor.to(device) for tensor in tensors_of(update)]
    return LowRankUpdate(*tensors, update.scaling) if isinstance(update, LowRankUpdate) else DenseUpdate(*tensors)
