"""A small plain training loop: AdamW, warm-up, clipped gradients, seeded batches, stop at a loss."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .plugin import TrainingPlugin

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingSettings:
    """``schedule``: "constant" or "cosine" (to zero at ``steps``), after ``warmup_steps`` of linear rise.

    ``stop_loss``: stop as soon as the loss, averaged over the last ``stop_window`` steps, is below it; None runs all.
    ``precision``: "float32", or "bfloat16" for autocast of the forward; the trained parameters keep their dtype.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0
    stop_loss: float | None = None
    stop_window: int = 20
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.stop_window < 1:
            raise ValueError(
                "steps, batch_size, stop_window: expected at least 1 each, "
                f"got {self.steps}, {self.batch_size}, {self.stop_window}"
            )
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule: expected 'constant' or 'cosine', got {self.schedule!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")


@dataclass
class TrainingLog:
    """The loss of each step that ran (mean over answer tokens), seconds in all, and whether ``stop_loss`` ended it."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped_early: bool = False

    def recent_loss(self, window: int = 20) -> float:
        """Mean loss of the last ``window`` steps."""
        recent = self.losses[-window:]
        return sum(recent) / len(recent)

    def __str__(self) -> str:
        reason = ", stopped at the target loss" if self.stopped_early else ""
        return f"{len(self.losses)} steps in {self.seconds:.1f} s, loss {self.recent_loss():.4f}{reason}"


def train(
    model: torch.nn.Module,
    samples: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    settings: TrainingSettings,
    description: str = "training",
    plugins: Sequence[TrainingPlugin] = (),
) -> TrainingLog:
    """Train the parameters that require a gradient, in place; the model is left in evaluation mode.

    ``collate`` turns a list of samples into model inputs with labels. Batches go through the samples in a seeded
    order, reshuffled at each epoch. ``plugins`` may add penalties and change gradients; the losses that are logged, and
    ``stop_loss``, are without penalties. Raises ValueError on no samples or nothing to train, FloatingPointError when
    the loss is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient")
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    log = TrainingLog()
    started = time.perf_counter()
    batches = _batches(samples, settings)
    model.train()
    for plugin in plugins:
        plugin.start(model)
    autocast = PRECISIONS[settings.precision]
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=settings.steps, desc=description, disable=not sys.stderr.isatty()) as bar,
    ):
        torch.manual_seed(settings.seed)  # for dropout, should the model have any
        for _ in range(settings.steps):
            inputs = {name: value.to(device) for name, value in collate(next(batches)).items()}
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                outputs = model(**inputs, use_cache=False)
                loss = outputs.loss
                penalties = [plugin.penalty(model, inputs, outputs) for plugin in plugins]
            log.losses.append(loss.item())
            if not math.isfinite(log.losses[-1]):
                model.eval()
                raise FloatingPointError(f"{description}: the loss is {log.losses[-1]} at step {len(log.losses)}")
            sum((penalty for penalty in penalties if penalty is not None), start=loss).backward()
            for plugin in plugins:
                plugin.after_backward(model)
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            for plugin in plugins:
                plugin.after_step(model)
            bar.update()
            bar.set_postfix_str(f"loss {log.losses[-1]:.3f}", refresh=False)
            if settings.stop_loss is not None and len(log.losses) >= settings.stop_window:
                log.stopped_early = log.recent_loss(settings.stop_window) < settings.stop_loss
                if log.stopped_early:
                    break
    model.eval()
    log.seconds = time.perf_counter() - started
    return log


def _rate(step: int, settings: TrainingSettings) -> float:
    """Share of the learning rate at this 0-based step."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.schedule == "constant":
        return warmup
    return warmup * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / settings.steps)))


def _batches(samples: Sequence[Any], settings: TrainingSettings) -> Iterator[list[Any]]:
    """Batches without end; each epoch in an order of its own, a batch may reach into the next epoch."""
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    rng = random.Random(settings.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < settings.batch_size:
            epoch = list(range(len(samples)))
            rng.shuffle(epoch)
            waiting += epoch
        yield [samples[index] for index in waiting[: settings.batch_size]]
        del waiting[: settings.batch_size]
