"""The shape of a method that changes the tuning itself, and the LoRA that most of them leave in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.training.lora import LANGUAGE_LINEARS, add_lora
from hpa_ext.training.plugin import TrainingPlugin


@dataclass(frozen=True)
class StepContext:
    """One tuning step of a sequence.

    Attributes:
        number: 0-based.
        seed: of the adapter and the order of samples.
        rank, alpha: of the LoRA.
        samples: what the step is tuned on.
        collate: makes model inputs with labels of a list of samples.
    """

    number: int
    seed: int
    rank: int
    alpha: float
    samples: Sequence[Any] = field(default=(), repr=False)
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = field(default=None, repr=False)


class TrainingMethod(TrainingPlugin):
    """A method that changes the tuning; one object lives through the whole sequence.

    As it stands it is plain sequential tuning: a fresh LoRA each step, merged afterwards.
    """

    targets: str = LANGUAGE_LINEARS
    plain_first_step: bool = True
    """Whether the first step of a sequence is plain tuning, so that its result may be shared."""

    learning_rate_factor: float = 1.0
    """Of the regime's learning rate, for methods that train something other than LoRA."""

    def attach(self, model: nn.Module, step: StepContext) -> nn.Module:
        """Put what this step trains on the model that the step before left; only that may require gradients."""
        return add_lora(model, step.rank, step.alpha, seed=step.seed, targets=self.targets)

    def finish(self, model: nn.Module, step: StepContext) -> nn.Module:
        """The model that answers after this step and is given to the next `attach`."""
        return model.merge_and_unload()

    def state_bytes(self) -> int:
        """What the method keeps from one step to the next, beside the model, in bytes."""
        return 0


@dataclass(frozen=True)
class LoraFactors:
    """The trained factors of one linear: ``a`` ``[r, in]``, ``b`` ``[out, r]``, ``scaling``; and the layer itself."""

    a: Tensor
    b: Tensor
    scaling: float
    layer: nn.Module

    def update(self) -> Tensor:
        """``scaling B A`` ``[out, in]``, with a gradient."""
        return self.scaling * (self.b @ self.a)


def lora_factors(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, LoraFactors]]:
    """Name and factors of every linear that carries a LoRA."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield name, LoraFactors(a, b, module.scaling[adapter], module.get_base_layer())


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def without_autocast() -> Any:
    """Penalties on parameters are computed in the parameters' own dtype."""
    return torch.autocast("cpu", enabled=False)
