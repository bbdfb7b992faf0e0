"""Adapters merged into a checkpoint on disk, with nothing harmonized: how an HPA adapter becomes a plain model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hpa_ext.checkpoints.identity import identity
from hpa_ext.checkpoints.output import check_output
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.run import carry_out
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.processes import Processes


class MergeJob(Job):
    """A job without a module to harmonize: all that the adapters change is written as they make it."""

    def identity(self, device: object) -> dict[str, object]:
        """See `Job`; the device has no part in it."""
        inputs = {
            "base": self.old.reader.fingerprint(),
            "adapters": [adapter.fingerprint() for adapter in self.new.adapters],
        }
        return identity("merged", inputs, {"method": "merge"})


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Write a model on disk with adapters merged into it, a weight at a time.

    Args:
        base: directory of a model in safetensors, of any generation of names; the output has its files and names.
        adapters: directories of LoRA or HPA adapters, in the order of the steps; each counts as trained on the model
            with the ones before it merged.
        out, resume, progress: as for `harmonize_checkpoint`.

    Raises:
        ValueError: no adapter; CheckpointError: what lies on disk does not fit. OSError, KeyboardInterrupt: as
            `harmonize_checkpoint`.

    All steps are summed in float32 and rounded once to the dtype on disk.
    """
    adapters = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not adapters:
        raise ValueError("adapters: expected at least one directory, got none")
    processes = Processes.current()
    if not resume:
        processes.together(lambda: check_output(out, [base, *adapters]))
    job = processes.together(lambda: _prepare(base, adapters))
    carry_out(job, Path(out), [base, *adapters], resume, torch.device("cpu"), progress, processes)


def _prepare(base: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]]) -> MergeJob:
    old, new = CheckpointWeights(base), CheckpointWeights(base, adapters=adapters)
    return MergeJob(old, new, new.adapters[-1], "checkpoint", HPAConfig(), {}, {}, {}, {})
