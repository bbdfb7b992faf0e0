"""What a method may do inside the training loop, at four points of a step; by default nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class TrainingPlugin:
    """Base class of methods that change the training itself: a penalty, a mask on gradients.

    The loop calls `start` once, then for every step `penalty` (after the forward), `after_backward` (before gradients
    are clipped) and `after_step` (after the optimizer).
    """

    def start(self, model: nn.Module) -> None:
        """The model as it is before the first step, in training mode."""

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """A scalar that is added to the loss; None for nothing."""
        return None

    def after_backward(self, model: nn.Module) -> None:
        """Gradients are there, not clipped yet."""

    def after_step(self, model: nn.Module) -> None:
        """The parameters have moved; gradients are cleared."""
