"""`harmonize_adapter`: a PEFT adapter in, a PEFT adapter out; the base model is never read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.adapter import EXTRA_FILE
from hpa_ext.checkpoints.adapter_config import CONFIG_FILE
from hpa_ext.checkpoints.identity import identity
from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.manifest import write_manifest
from hpa_ext.checkpoints.output import begin_output, check_output, finished_output, partial_directory, publish
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.side_files import copy_side_files, side_files
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.compromise.adapter_file import AdapterFile, BaseModel
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.layer import checked_config
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport, report_warnings
from hpa_ext.compromise.solution import Compromise
from hpa_ext.errors import NumericalError
from hpa_ext.hpa.checkpoint.arguments import input_paths, usable_device
from hpa_ext.hpa.checkpoint.grams import GramSource
from hpa_ext.hpa.checkpoint.progress import Interrupted, Progress
from hpa_ext.hpa.config import HPAConfig

_COPIED = "copied"


def harmonize_adapter(
    adapter: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    out: str | os.PathLike[str],
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[GramSource] = (),
    base: BaseModel | None = None,
    modules: str | Iterable[str] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CompromiseReport:
    """Write the compromise of a LoRA adapter as a LoRA adapter: only A changes, to ``A H_t (H_t + mu H_s)^-1``.

    The result has the ranks, names, dtypes and configuration of the input, and plain PEFT loads it, on the base in 16
    bits, in 8 or in 4. It is exact for plain LoRA with any scaling (rsLoRA, rank_pattern, alpha_pattern), up to the
    rounding of A to its dtype.

    Args:
        adapter: directory of a PEFT LoRA adapter.
        safety: Grams of the safety set through the model before the step: the path of a Gram file, or `Gram` by module
            name in the loaded transformers model.
        task: Grams of the task set through the model with the adapter.
        out: directory to make; must not exist, or be empty. Until it is complete its contents are in ``<out>.partial``.
        config: settings; None for the defaults.
        earlier: Grams of earlier tasks, protected by ``config.earlier_strength``.
        base: the model that the adapter belongs to, or its directory, of which ``config.json`` alone is read: needed
            for the names of other generations of transformers. None: the names in the file are the Grams'.
        modules: a regular expression that must match a whole module name, or names; None for every module of the
            adapter that the Grams have. The others stay as the tuning made them, and the report names them.
        resume: go on with what an interrupted run left in ``<out>.partial``; if there is nothing, begin. The result has
            the same bytes as without interruption. A finished `out` of the same inputs and settings is left as it is.
        device: where the arithmetic is done.
        progress: show a bar when stderr is a terminal.

    Returns:
        A `CompromiseReport` with a `CompromiseLayerReport` for each module. Prints as a table.

    Raises:
        TypeError, ValueError: arguments, adapter, Grams or settings do not fit (CheckpointError for what lies on disk):
            DoRA, ``lora_bias``, trained biases and ``modules_to_save`` of modules that would be harmonized, which a
            change of A cannot express; adapters with HPA's gain; an `HPAConfig`, whose result depends on the base.
        FileExistsError: `out` holds something; or ``<out>.partial`` does and `resume` is False.
        OSError: a file cannot be read or written.
        NumericalError: A, B or a Gram holds NaN or Inf, or the Grams cannot be factored; names the module.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.

    The Grams of one input are in memory at a time (`2 + len(earlier)` matrices, their sum and its factor); modules that
    share them share the factor of a strength.
    """
    if isinstance(config, HPAConfig):
        raise TypeError(
            "config: expected a CompromiseConfig, got an HPAConfig, whose result depends on the base weights; use "
            'harmonize_checkpoint(..., output="adapter")'
        )
    config = checked_config(config)
    inputs = input_paths(out, [], adapter=adapter) + directories_of(base)
    device = usable_device(device)
    out = Path(out)
    if not resume:
        check_output(out, inputs)
    source = AdapterFile(adapter, base)
    try:
        grams = GramSources.open(safety, task, earlier)
        names = source.choose(grams.mappings, modules)
        grams.check({name: source.modules[name].in_features for name in names})
        job = AdapterJob(source, grams, names, config, device)
        who = job.identity()
        done = finished_output(out, who) if resume else None
        if done is not None:
            return job.report(_reports_of(done["report"]["layers"]))
        partial = partial_directory(out)
        bar = Progress(progress)
        try:
            with begin_output(out, who, resume=resume, inputs=[*inputs, *grams.paths()]) as journal:
                reports = job.write(partial, journal, bar)
                report = job.report(reports)
                write_manifest(
                    partial, who, {**report.to_dict(), "layers": [r.to_dict() for r in report.layers.values()]}
                )
                publish(partial, out, journal)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; what is finished lies in {partial}: go on with --resume (resume=True), or delete it"
            ) from error
        finally:
            bar.close()
        return report
    finally:
        source.close()


def directories_of(base: BaseModel | None) -> list[str]:
    """The base's directory, which the output must not lie in, where it is given as one."""
    return [os.fspath(base)] if isinstance(base, (str, os.PathLike)) else []


@dataclass
class AdapterJob:
    """An adapter and Grams that fit together.

    Attributes:
        names: the modules to harmonize, layer by layer.
    """

    source: AdapterFile
    grams: GramSources
    names: list[str]
    config: CompromiseConfig
    device: torch.device

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        inputs = {"adapter": self.source.fingerprint(), **self.grams.fingerprints(self.names)}
        settings = {
            "method": self.config.method, **self.config.to_dict(),
            "modules": self.names, "device": self.device.type,
        }  # fmt: skip
        return identity("adapter", inputs, settings)

    def report(self, reports: dict[str, CompromiseLayerReport]) -> CompromiseReport:
        """The report of the whole."""
        left = [name for name in self.source.modules if name not in set(self.names)]
        ordered = {name: reports[name] for name in self.names}
        warnings = report_warnings(ordered, self.config)
        if left:
            warnings.append(f"{len(left)} modules of the adapter stay as the tuning made them, such as {left[0]}")
        return CompromiseReport(ordered, self.config, not_covered=[*left, *self.source.others], warnings=warnings)

    def write(self, partial: Path, journal: Journal, bar: Progress) -> dict[str, CompromiseLayerReport]:
        """Fill the directory with all but the manifest; the reports by name."""
        source = self.source
        keys = {name: source.modules[name].entries["a"].name for name in self.names}
        with ShardedWriter(partial, [ShardPlan.of_shard(source.shard)]) as writer:
            if _COPIED in journal.finished:
                writer.open()
                writer.mark_written(entry.name for entry in source.shard.entries if entry.name not in keys.values())
            else:
                writer.create(replace=True)
                self._copy(writer, set(keys.values()))
                writer.sync()
                journal.append(_COPIED)
            reports = self._solve(writer, keys, journal, bar)
            writer.finish()
        for name in (CONFIG_FILE, EXTRA_FILE):
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, partial / name)
        copy_side_files(side_files(source.directory), source.directory, partial)
        return reports

    def _copy(self, writer: ShardedWriter, changed: set[str]) -> None:
        """The bytes of every tensor that stays as it is."""
        for entry in self.source.shard.entries:
            if entry.name not in changed:
                buffer = bytearray(entry.nbytes)
                self.source.read_into(entry.name, memoryview(buffer))
                writer.write_bytes(entry.name, 0, memoryview(buffer))

    def _solve(
        self, writer: ShardedWriter, keys: dict[str, str], journal: Journal, bar: Progress
    ) -> dict[str, CompromiseLayerReport]:
        """Every A that changes, group by group of modules with one input."""
        done = {name: journal.finished[_key(name)] for name in self.names if _key(name) in journal.finished}
        writer.mark_written(keys[name] for name in done)
        reports = _reports_of(done.values())
        bar.begin("compromise", len(self.names), "module", len(done))
        for group in self.grams.groups(self.names):
            compromise: Compromise | None = None
            for name in group:
                if name not in reports:
                    bar.show(name)
                    if compromise is None:
                        width = self.source.modules[name].in_features
                        compromise = self.grams.compromise(name, self.config, self.device, width)
                    a, reports[name] = self._module(name, compromise)
                    writer.write(keys[name], a)
                    writer.sync([keys[name]])
                    journal.append(_key(name), reports[name].to_dict())
                    bar.advance(1)
        return reports

    def _module(self, name: str, compromise: Compromise) -> tuple[Tensor, CompromiseLayerReport]:
        """A of the compromise ``[r, in]`` on the CPU in its dtype, and the report."""
        update = self.source.rows(name, self.device)
        try:
            solution = compromise.solve(update)
        except NumericalError as error:
            raise error.in_module(name) from error
        a = solution.rows.to(update.rows.dtype)
        if not bool(torch.isfinite(a).all()):
            raise NumericalError(f"the new lora_A overflows {a.dtype}; save the adapter in float32", module=name)
        return a.cpu(), CompromiseLayerReport.of(name, solution, compromise, self.grams.earlier_count)


def _reports_of(records: Iterable[dict[str, Any]]) -> dict[str, CompromiseLayerReport]:
    return {record["name"]: CompromiseLayerReport.from_dict(record) for record in records}


def _key(name: str) -> str:
    return f"module:{name}"
