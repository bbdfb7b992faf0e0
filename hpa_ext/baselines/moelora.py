"""MoELoRA (Chen et al., CoIN, NeurIPS 2024): several small LoRA experts per linear, mixed by a router per token."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from hpa_ext.training.lora import LANGUAGE_LINEARS

from .registry import training
from .tuning_step import StepContext, TrainingMethod, tensor_bytes


class MixtureLinear(nn.Module):
    """``W x + s sum_e softmax(R x)_e B_e A_e x``: a frozen linear and dense experts of rank r/E each."""

    def __init__(self, base: nn.Linear, experts: int, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scaling, self.rank = base, scaling, rank
        weight = base.weight
        bound = 1 / math.sqrt(weight.shape[1])
        start = torch.empty(experts * rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start.to(weight))  # the experts' A, one below the other
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], experts * rank))  # their B, side by side
        self.router = nn.Parameter(weight.new_zeros(experts, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        gates = (x @ self.router.mT).softmax(-1).repeat_interleave(self.rank, dim=-1)
        return self.base(x) + self.scaling * ((x @ self.down.mT) * gates) @ self.up.mT


class MoELoRA(TrainingMethod):
    """One mixture on every linear, trained on through all tasks; not mergeable, for the router depends on x."""

    plain_first_step = False

    def __init__(self, experts: int) -> None:
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        self.experts = experts
        self.mixtures: list[MixtureLinear] = []

    def attach(self, model: nn.Module, step: StepContext) -> nn.Module:
        """At the first step put the mixtures in; later ones go on with them. ValueError if the rank does not divide."""
        if self.mixtures:
            return model
        if step.rank % self.experts:
            raise ValueError(f"experts: expected a divisor of the LoRA's rank {step.rank}, got {self.experts}")
        generator = torch.Generator().manual_seed(step.seed)
        names = [name for name, _ in model.named_modules() if re.fullmatch(LANGUAGE_LINEARS, name)]
        for name in names:
            base = model.get_submodule(name).requires_grad_(False)
            mixture = MixtureLinear(base, self.experts, step.rank // self.experts, step.alpha / step.rank, generator)
            model.set_submodule(name, mixture)
            self.mixtures.append(mixture)
        return model

    def finish(self, model: nn.Module, step: StepContext) -> nn.Module:
        """The model with its mixtures."""
        return model

    def state_bytes(self) -> int:
        """Experts and routers, which stay beside the model."""
        return tensor_bytes([value for m in self.mixtures for value in (m.down, m.up, m.router)])


@training("moelora", "MoELoRA", "CoIN, NeurIPS 2024", strength="experts", grid=(2, 4, 8))
def moelora(*, experts: int = 4) -> MoELoRA:
    """MoELoRA with the number of experts among which the rank is divided."""
    return MoELoRA(experts)
