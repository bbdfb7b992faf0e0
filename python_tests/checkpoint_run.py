"""A small run over a checkpoint, with all that a real one does to its output directory: each weight is doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpa_ext.checkpoints import (
    CheckpointReader,
    LayerMasks,
    ShardedWriter,
    ShardPlan,
    begin_output,
    copy_side_files,
    finished_output,
    identity,
    partial_directory,
    publish,
    write_manifest,
    write_masks,
)


def run(source: Path, out: Path, resume: bool = False, factor: float = 2.0) -> dict[str, Any]:
    """Write `source` times `factor` to `out`; the norms stay as they are. Returns the manifest."""
    with CheckpointReader(source) as reader:
        who = identity("checkpoint", {"old": reader.fingerprint()}, {"factor": factor})
        if resume and (manifest := finished_output(out, who)):
            return manifest
        with begin_output(out, who, resume=resume, inputs=[source]) as journal:
            partial = partial_directory(out)
            writer = ShardedWriter(partial, [ShardPlan.of_shard(shard) for shard in reader.shards], reader.index())
            with writer:
                if "created" in journal.finished:
                    writer.open()
                else:
                    writer.create(replace=True)
                    journal.append("created")
                for name in reader:
                    if name not in journal.finished:
                        tensor = reader.read(name)
                        writer.write(name, tensor if "norm" in name else tensor * factor)
                        writer.sync([name])
                        journal.append(name, {"sum": float(tensor.float().sum())})
                writer.mark_written(journal.finished.keys() - {"created"})
                digests = {plan.file_name: writer.digest(plan.file_name) for plan in writer.plans}
                writer.finish()
            copy_side_files(reader.side_files(), reader.directory, partial)
            write_masks(partial, {name: _masks(name, reader) for name in reader if "norm" in name})
            report = {name: journal.finished[name] for name in reader}
            manifest = write_manifest(partial, who, report, digests)
            publish(partial, out, journal)
    return manifest


def _masks(name: str, reader: CheckpointReader) -> LayerMasks:
    everything = torch.ones(reader.entries[name].shape[0], dtype=torch.bool)
    return LayerMasks(everything, everything, everything, name, name, 0)
