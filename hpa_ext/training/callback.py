"""Harmonizing at the end of each task of one's own training: transformers' Trainer, or a loop with accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.compromise import CompromiseConfig, CompromiseReport, add_task_
from hpa_ext.gram import Gram, GramCollection
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.harmonizing import AnyReport, Config
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.models.structure import without_data_parallel
from hpa_ext.token_masks import TokenMask

from .harmonized_task import Batches, HarmonizedTask, TaskSettings

logger = logging.getLogger(__name__)

# In the Trainer's state, which it writes into each checkpoint.
STATE_KEY = "hpa_ext.HarmonizeCallback"


class HarmonizeCallback(TrainerCallback):
    """Harmonizes the model in place when the training of a task ends.

    ``Trainer(..., callbacks=[HarmonizeCallback(safety_batches, task_batches)])`` is enough; each ``trainer.train()`` is
    a task. In a loop of one's own, call `before_task` once the model is prepared (sharded, wrapped) and `after_task` at
    the end.

    When the task begins, the safety Grams are made with the model as it is, and the old weights are remembered: nothing
    for LoRA whose B is zero, because its base weights stay what they are; else copies on the host of the linears that
    are trained (under FSDP2 each process its own part). When it ends, the task Grams are made with the tuned model,
    all Grams are added up over the processes, and the weights are harmonized. The Trainer has written its last
    checkpoint before that, so save the model after ``train()``: a fully tuned one with ``trainer.save_model()``. With
    LoRA the harmonized weights are in the base layers and the adapter adds nothing any more, so that an adapter saved
    now would lose the step: save ``model.merge_and_unload()``. A warning says so when it happens.

    Args:
        safety: batches for the safety Grams, such as a list or a DataLoader, or a function that returns such; each
            process gives its own share. Or Grams by module name, made with the model before the task.
        task: batches of the task.
        config: an `HPAConfig`, or a `CompromiseConfig`, which takes whole Grams and refuses sharded weights (FSDP2);
            None for HPA's defaults.
        modules: which linears are covered, as for `harmonize_model`; those among them that are trained are harmonized.
        token_mask: as for `calibrate`.
        model_old: the model before the task, in place of what is found when it begins. Needed when a full fine-tuning
            resumes from a checkpoint, for the model has moved by then. The whole model on every process.
        passes: go over the batches so often, each time for a part of the layers. Only this part's full Grams are in
            memory at a time (all of 7B: 21.9 GB); of the others the diagonals that HPA needs.
        protect_earlier: with a `CompromiseConfig`, protect in each task the outputs on the tasks before it, by
            ``config.earlier_strength``. After a task its Grams are added to a sum in which each task counts alike: one
            matrix per input however many tasks.
        earlier: the tasks of an earlier run: a Gram file (`save_earlier`, or ``hpa-ext grams sum``), or Grams by
            module name. None: none.
        trainer: whose ``log`` gets the summary, and so every tracker; may be set later as an attribute. None: the
            summary goes to the state's ``log_history`` and to this module's logger.
        progress: show bars when stderr is a terminal.

    Attributes:
        reports: the `ModelReport`, or `CompromiseReport`, of each task that ended.
        earlier: the sum of the tasks' Grams so far, by module name; empty without any.

    A training that resumes is recognised by its step. If the task began with LoRA that was zero (the checkpoint says
    so), the base model is still the old one; otherwise `model_old` is needed, and asked for. So is `earlier` where the
    run protected earlier tasks: `save_earlier` after each task, for a checkpoint does not hold their Grams. Works under
    DDP and FSDP2 (accelerate's ``fsdp_version=2``); FSDP1 and DeepSpeed ZeRO-3 are refused by name. The run's random
    numbers are left as they would be without the callback.
    """

    def __init__(
        self,
        safety: Batches | Mapping[str, AnyGram],
        task: Batches,
        config: Config | None = None,
        *,
        modules: str | Iterable[str] | None = None,
        token_mask: TokenMask | None = "attended",
        model_old: nn.Module | None = None,
        passes: int = 1,
        protect_earlier: bool = True,
        earlier: str | os.PathLike[str] | Mapping[str, Gram] | None = None,
        trainer: Any = None,
        progress: bool = True,
    ) -> None:
        names = modules if modules is None or isinstance(modules, str) else list(modules)
        config = HPAConfig() if config is None else config
        self.settings = TaskSettings(safety, task, config, names, token_mask, model_old, passes, progress)
        self.trainer = trainer
        self.protect_earlier = protect_earlier and isinstance(config, CompromiseConfig)
        if earlier is not None and not self.protect_earlier:
            raise ValueError("earlier: expected none without protect_earlier and a CompromiseConfig")
        self.earlier = GramCollection()
        if earlier is not None:
            add_task_(self.earlier, earlier if isinstance(earlier, Mapping) else GramFile(earlier))
        self.reports: list[AnyReport] = []
        self._task: HarmonizedTask | None = None

    def before_task(self, model: nn.Module, *, adapters_were_zero: bool | None = None) -> None:
        """Remember the weights and make the safety Grams, see `HarmonizedTask.begin`. Every process must call this."""
        self._task = None
        self._task = HarmonizedTask.begin(
            model, self.settings, adapters_were_zero=adapters_were_zero, earlier=self.earlier
        )

    def after_task(self, model: nn.Module) -> AnyReport:
        """Harmonize the tuned model in place; the report is added to `reports`. Every process must call this."""
        if self._task is None:
            raise RuntimeError("after_task: before_task was not called for this task")
        report, grams = self._task.end(model, [self.earlier] if self.earlier else [])
        self._task = None
        self.reports.append(report)
        if self.protect_earlier:
            self._add_to_earlier(grams)
        if hasattr(without_data_parallel(model), "get_base_model"):
            logger.warning(
                "the harmonized weights are in the base layers and the adapter adds nothing any more: an adapter saved "
                "now would lose the step; save model.merge_and_unload()"
            )
        return report

    def _add_to_earlier(self, grams: Mapping[str, Gram]) -> None:
        foreign = [name for name in self.earlier if name not in grams]
        if foreign:
            logger.warning("earlier: left out, for the decoder has no such linear: %s", ", ".join(foreign))
            self.earlier = GramCollection({name: gram for name, gram in self.earlier.items() if name in grams})
        add_task_(self.earlier, grams)

    def save_earlier(self, path: str | os.PathLike[str]) -> None:
        """Write the sum of the tasks' Grams so far as a Gram file, for `earlier` of a later run, or ``--earlier``.

        On one process is enough: all have the same. ValueError before the first task; others as `save_grams`.
        """
        if not self.earlier:
            raise ValueError("save_earlier: there is no task yet whose Grams were kept")
        save_grams(self.earlier, path, {"tasks_of_a_training_run": len(self.reports)})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """See `before_task`."""
        resumes = state.global_step > 0
        if self._task is not None and self._task.model() is model and not resumes:
            logger.warning("the training of this task starts again: what was remembered of the model stays in use")
            return
        kept = (state.stateful_callbacks or {}).get(STATE_KEY, {}).get("attributes", {})
        if resumes and kept.get("protected_earlier") and self.protect_earlier and not self.earlier:
            raise ValueError(
                "earlier: the training goes on from a checkpoint of a run that protected earlier tasks; a checkpoint "
                "does not hold their Grams; give earlier, the file that save_earlier wrote after the task before"
            )
        self.before_task(model, adapters_were_zero=bool(kept.get("adapters_were_zero")) if resumes else None)
        attributes = {"adapters_were_zero": self._task.old is None}
        if self.earlier:
            attributes["protected_earlier"] = True
        entry = {"args": {}, "attributes": attributes}
        state.stateful_callbacks = {**(state.stateful_callbacks or {}), STATE_KEY: entry}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """See `after_task`."""
        report = self.after_task(model)
        values = summary(report)
        if self.trainer is not None:
            self.trainer.log(values)
        else:
            state.log_history.append({**values, "step": state.global_step})
        if state.is_world_process_zero:
            logger.info("harmonized: %s", ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
            for warning in report.warnings:
                logger.warning("%s", warning)


def summary(report: AnyReport) -> dict[str, float]:
    """What is logged of a report: the numbers of layers and warnings, and means over the layers that have a value."""
    layers = list(report.layers.values())
    if isinstance(report, CompromiseReport):
        prefix = "compromise"
        of_layers = {
            "safety_left": [layer.safety_left for layer in layers],
            "earlier_left": [layer.earlier_left for layer in layers],
            "task_lost": [layer.task_lost for layer in layers],
            "update_norm": [layer.update_norm for layer in layers],
        }
    else:
        prefix = "hpa"
        of_layers = {
            "retained_percent": [100 * layer.retained_count / len(layer.retained) for layer in layers],
            "alpha": [layer.alpha for layer in layers],
            "projection_coefficient": [layer.projection_coefficient for layer in layers],
            "update_norm": [layer.update_norm for layer in layers],
        }
    found = {key: [value for value in values if value is not None] for key, values in of_layers.items()}
    means = {f"{prefix}_{key}": sum(values) / len(values) for key, values in found.items() if values}
    return {f"{prefix}_layers": len(layers), f"{prefix}_warnings": len(report.warnings), **means}
