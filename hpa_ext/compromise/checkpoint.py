"""`harmonize_checkpoint` for the compromise: from disk to disk, a weight at a time, as HPA's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.adapter_config import CONFIG_FILE
from hpa_ext.checkpoints.output import check_output
from hpa_ext.compromise.adapter import harmonize_adapter
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.layer import checked_config, merge_lora, merge_with
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport, report_warnings
from hpa_ext.compromise.solution import Compromise
from hpa_ext.errors import NumericalError
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.checkpoint.job import OUTPUTS, Job
from hpa_ext.hpa.checkpoint.models import Models, check_weights
from hpa_ext.hpa.checkpoint.run import carry_out
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.update import WeightUpdate
from hpa_ext.processes import Processes


def harmonize_checkpoint(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    output: str = "checkpoint",
    old_adapters: Sequence[str | os.PathLike[str]] = (),
    modules: str | Iterable[str] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CompromiseReport:
    """The compromise of a model on disk and the one before a tuning step, into a new directory, a weight at a time.

    Args:
        old, new, safety, task, out, old_adapters, modules, resume, device, progress: as for
            `hpa_ext.hpa.checkpoint.harmonize_checkpoint`; the Grams must be whole ones.
        config: settings; None for the defaults.
        earlier: Grams of earlier tasks, protected by ``config.earlier_strength``.
        output: "checkpoint" for a whole model. "adapter" for what `harmonize_adapter` makes of `new`, an adapter; the
            names are then those of `old`, of which nothing else is read.

    Returns:
        A `CompromiseReport`.

    Raises: as `hpa_ext.hpa.checkpoint.harmonize_checkpoint`, and as `harmonize_adapter` for ``output="adapter"``.

    An adapter's A is solved for and rounded to its dtype before it is merged, so that the checkpoint has the very
    weights that ``output="adapter"`` and merging give. DoRA, and weights that an adapter replaces, are taken as dense
    updates. Biases stay as the tuning made them. Under torch.distributed the weights are divided among the processes,
    and the result has the same bytes; an adapter is written by one process alone.
    """
    processes = Processes.current()
    config = processes.together(lambda: checked_config(config))
    inputs = processes.together(lambda: input_paths(out, old_adapters, old=old, new=new))
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    if output == "adapter":
        check_adapter(new)
        if processes.count > 1:
            raise ValueError('output: "adapter" takes seconds to minutes on one process; start it without torchrun')
        return harmonize_adapter(
            new, safety, task, out, config,
            earlier=earlier, base=Path(old), modules=modules, resume=resume, device=device, progress=progress,
        )  # fmt: skip
    device = processes.together(lambda: usable_device(device))
    out = Path(out)
    if not resume:
        processes.together(lambda: check_output(out, inputs))
    job = processes.together(lambda: prepare(old, new, safety, task, earlier, config, inputs[2:], modules))
    return carry_out(job, out, inputs, resume, device, progress, processes)


def check_adapter(new: str | os.PathLike[str]) -> None:
    """ValueError unless there is a PEFT adapter, as ``output="adapter"`` needs."""
    if not (Path(new) / CONFIG_FILE).is_file():
        raise ValueError(f'output: "adapter" needs a LoRA adapter as new, got {new} without {CONFIG_FILE}')


def prepare(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    earlier: Sequence[GramSource],
    config: CompromiseConfig,
    old_adapters: Sequence[str | os.PathLike[str]],
    modules: str | Iterable[str] | None,
) -> Job:
    """Open everything and refuse what does not fit."""
    sources = GramSources.open(safety, task, earlier)
    models = Models.open(old, new, old_adapters, modules)
    for name in models.linears:
        check_weights(name, models)
    sources.check({name: linear.base_weight().shape[1] for name, linear in models.linears.items()})
    return models.job(
        CompromiseJob,
        output="checkpoint",
        config=config,
        safety=sources.mappings["safety"],
        task=sources.mappings["task"],
        method=CompromiseMethod(sources, config),
    )


class CompromiseJob(Job):
    """A job of the compromise; see `Job`."""

    def identity(self, device: torch.device) -> dict[str, object]:
        """Everything that decides the result, as JSON values."""
        values = super().identity(device)
        values["inputs"].update(self.method.sources.fingerprints(self.names))
        values["config"]["method"] = self.config.method
        return values


@dataclass
class CompromiseMethod:
    """See `CheckpointMethod`. The Grams of the input that was used last are kept, with their factor.

    Attributes:
        sources: the Grams.
        config: settings.
    """

    sources: GramSources
    config: CompromiseConfig
    _group_of: dict[str, int] = field(default_factory=dict, repr=False)
    _last: tuple[Any, Compromise] | None = field(default=None, repr=False)

    def reduce(self, job: Job, *others: Any) -> None:
        """Nothing is done before the first weight."""
        self._group_of = {name: index for index, group in enumerate(self.sources.groups(job.names)) for name in group}

    def merge(
        self, job: Job, reduced: None, modules: Sequence[str], updates: Sequence[WeightUpdate]
    ) -> list[tuple[Tensor, CompromiseLayerReport]]:
        """Solve for the modules, one after the other, and add what is left of their updates."""
        return [self._merge(module, update) for module, update in zip(modules, updates, strict=True)]

    def _merge(self, module: str, update: WeightUpdate) -> tuple[Tensor, CompromiseLayerReport]:
        compromise = self._compromise(module, update)
        count = self.sources.earlier_count
        try:
            if not isinstance(update, LowRankUpdate):
                return merge_with(compromise, update.old, update.new, count, module)
            return merge_lora(compromise, update.old, (update.a, update.b, update.scaling), count, module)
        except NumericalError as error:
            raise error.in_module(module) from error

    def record(self, report: CompromiseLayerReport) -> dict[str, Any]:
        """See `CheckpointMethod`."""
        return report.to_dict()

    def report_of(self, record: Mapping[str, Any]) -> CompromiseLayerReport:
        """See `CheckpointMethod`."""
        return CompromiseLayerReport.from_dict(record)

    def write_beside(self, job: Job, partial: Path, reports: Sequence[CompromiseLayerReport]) -> None:
        """Nothing: no column is retained as it was."""

    def manifest_report(self, job: Job, reports: Sequence[CompromiseLayerReport]) -> dict[str, Any]:
        """See `CheckpointMethod`."""
        whole = self.model_report(job, reports).to_dict()
        return whole | {"layers": list(whole["layers"].values())}

    def model_report(self, job: Job, reports: Sequence[CompromiseLayerReport]) -> CompromiseReport:
        """See `CheckpointMethod`."""
        by_name = {report.name: report for report in reports}
        layers = {name: by_name[name] for name in job.names}
        return CompromiseReport(
            layers=layers,
            config=self.config,
            shared=job.shared,
            not_covered=job.not_covered,
            warnings=report_warnings(layers, self.config) + job.warnings,
        )

    def _compromise(self, module: str, update: WeightUpdate) -> Compromise:
        float64 = update.old.dtype == torch.float64
        key = self._group_of[module], update.device, float64
        if self._last is None or self._last[0] != key:
            self._last = None
            found = self.sources.compromise(module, self.config, update.device, update.shape[1], float64)
            self._last = key, found
        return self._last[1]
