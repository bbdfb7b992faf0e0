"""Training the expert of one task by the schedule of HiDe's authors, its anchors gathered along the way."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hpa_ext.hide.anchor_collection import AnchorCollector
from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.features import Features
from hpa_ext.hide.own_features import own_features
from hpa_ext.hide.structure import projector_name
from hpa_ext.hide.tensor_files import new_directory
from hpa_ext.training.loop import PRECISIONS, TrainingLog
from hpa_ext.training.lora import LANGUAGE_LINEARS

ANCHORS_FILE = "hide_anchors.safetensors"
"""Where `save_expert` puts a task's anchors, in the directory of its adapter."""


@dataclass(frozen=True)
class ExpertSchedule:
    """HiDe's schedule: an expert of rank 8, one epoch, AdamW, cosine to zero after a linear warm-up.

    Attributes:
        rank, alpha: of the LoRA; the authors' 48 and 96 are for six experts of rank 8 together, so the scaling is 2.
        learning_rate, projector_learning_rate: of the LoRA and of the projector; 0 leaves the projector as it is.
        epochs, batch_size, warmup_ratio, weight_decay, max_gradient_norm: the authors'.
        max_steps: stop there, and let the cosine end there; None for whole epochs.
        seed: of A's initial values and of the order of the samples.
        precision: "float32", or "bfloat16" for autocast of the forward (the authors' precision).
        targets: regular expression for the linears that get a LoRA; all of the language model's decoder.
    """

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 2e-4
    projector_learning_rate: float = 2e-5
    epochs: int = 1
    batch_size: int = 24
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    max_steps: int | None = None
    seed: int = 0
    precision: str = "float32"
    targets: str = LANGUAGE_LINEARS

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")
        if not self.learning_rate > 0 or not self.projector_learning_rate >= 0:
            raise ValueError(
                "learning_rate, projector_learning_rate: expected a positive number and one of at least 0, "
                f"got {self.learning_rate} and {self.projector_learning_rate}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: expected a number in [0, 1], got {self.warmup_ratio}")

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many samples."""
        whole = self.epochs * math.ceil(samples / self.batch_size)
        return whole if self.max_steps is None else self.max_steps

    def rate(self, step: int, steps: int) -> float:
        """Share of the learning rate at this 0-based step of `steps`."""
        warmup = math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class TrainedExpert:
    """``model``: the PeftModel with the expert (and the projector as ``modules_to_save``); ``log``: its training."""

    model: Any
    log: TrainingLog


def train_expert(
    model: torch.nn.Module,
    task: str,
    samples: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    schedule: ExpertSchedule | None = None,
    anchors: Anchors | None = None,
    features: Features | None = None,
) -> TrainedExpert:
    """Train one task's expert and projector on its samples alone.

    Args:
        model: the plain base model; wrapped by PEFT, so it holds the expert afterwards. Left in evaluation mode.
        task: its name.
        samples: any records that `collate` turns into model inputs with labels.
        collate: see `hpa_ext.data.collate_training`.
        schedule: None for the authors'.
        anchors: the task's features are added, each sample once; None gathers none.
        features: what the anchors are made of; None for the model's own.

    Raises:
        ValueError: no samples. FloatingPointError: the loss is not finite.
    """
    from peft import LoraConfig, get_peft_model

    schedule = ExpertSchedule() if schedule is None else schedule
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    features = own_features(model) if features is None else features
    projector = projector_name(model) if schedule.projector_learning_rate > 0 else None
    config = LoraConfig(
        r=schedule.rank, lora_alpha=schedule.alpha, target_modules=schedule.targets, bias="none",
        modules_to_save=None if projector is None else [projector.rpartition(".")[2]],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        adapted = get_peft_model(model, config)
    collector = AnchorCollector(adapted, anchors, task, features) if anchors is not None else None
    log = _run(adapted, task, samples, collate, schedule, collector)
    return TrainedExpert(adapted, log)


def save_expert(expert: TrainedExpert, directory: str | Path, anchors: Anchors | None = None) -> Path:
    """Write a plain PEFT adapter, with the task's anchors beside it, whole or not at all; returns the directory.

    ValueError if `directory` exists and is not empty.
    """
    with new_directory(directory) as unfinished:
        expert.model.save_pretrained(unfinished)
        if anchors is not None:
            anchors.save(unfinished / ANCHORS_FILE)
    return Path(directory)


def _run(
    model: torch.nn.Module,
    task: str,
    samples: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    schedule: ExpertSchedule,
    collector: AnchorCollector | None,
) -> TrainingLog:
    optimizer = torch.optim.AdamW(_groups(model, schedule), weight_decay=schedule.weight_decay)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = schedule.steps(len(samples))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, steps))
    device = parameters[0].device
    log = TrainingLog()
    autocast = PRECISIONS[schedule.precision]
    started = time.perf_counter()
    model.train()
    bar = tqdm(total=steps, desc=f"expert of {task}", disable=not sys.stderr.isatty())
    with torch.random.fork_rng(devices=[]), bar, _listening(collector):
        torch.manual_seed(schedule.seed)  # for dropout, should the model have any
        for (epoch, batch), _ in zip(_batches(samples, schedule), range(steps), strict=False):
            if collector is not None:
                collector.enabled = epoch == 0
            inputs = {name: value.to(device) for name, value in collate(batch).items()}
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss = model(**inputs, use_cache=False).loss
            if loss is None:
                raise ValueError(f"collate: expected inputs with labels, got {', '.join(inputs)}")
            log.losses.append(loss.item())
            if not math.isfinite(log.losses[-1]):
                model.eval()
                raise FloatingPointError(f"expert of {task}: the loss is {log.losses[-1]} at step {len(log.losses)}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            bar.update()
    model.eval()
    log.seconds = time.perf_counter() - started
    return log


def _listening(collector: AnchorCollector | None) -> Any:
    return contextlib.nullcontext() if collector is None else collector.listening()


def _groups(model: torch.nn.Module, schedule: ExpertSchedule) -> list[dict[str, Any]]:
    """Two rates: LoRA's, and the projector's."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = [parameter for name, parameter in trained.items() if "lora_" in name]
    others = [parameter for name, parameter in trained.items() if "lora_" not in name]
    groups = [{"params": lora, "lr": schedule.learning_rate}]
    return groups + ([{"params": others, "lr": schedule.projector_learning_rate}] if others else [])


def _batches(samples: Sequence[Any], schedule: ExpertSchedule) -> Iterator[tuple[int, list[Any]]]:
    """Epochs without end, each in an order of its own; no batch reaches into the next epoch."""
    rng = random.Random(schedule.seed)
    epoch = 0
    while True:
        order = list(range(len(samples)))
        rng.shuffle(order)
        for start in range(0, len(order), schedule.batch_size):
            yield epoch, [samples[index] for index in order[start : start + schedule.batch_size]]
        epoch += 1
