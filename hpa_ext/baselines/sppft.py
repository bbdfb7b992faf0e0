"""SPPFT (Li et al., ICLR 2025): the safety layers, a block in the middle of the model, are not updated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from .registry import training
from .tuning_step import StepContext, TrainingMethod


class SPPFT(TrainingMethod):
    """No update of decoder layers ``first`` to ``last`` (1-based, both included): they get no LoRA."""

    plain_first_step = False

    def __init__(self, first: int, last: int) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"block: expected 1 <= first <= last, got {first} and {last}")
        self.first, self.last = first, last

    def attach(self, model: nn.Module, step: StepContext) -> nn.Module:
        """A LoRA on the layers outside of the block. ValueError if none is left."""
        count = model.config.get_text_config().num_hidden_layers
        free = [str(number) for number in range(count) if not self.first - 1 <= number <= self.last - 1]
        if not free or self.last > count:
            raise ValueError(
                f"block: layers {self.first} to {self.last} of {count} leave nothing to tune, or end later"
            )
        self.targets = (
            rf".*language_model\.(model\.)?layers\.({'|'.join(free)})\."
            r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
        )
        return super().attach(model, step)


def safety_layers(angles_harmless: Sequence[float], angles_harmful: Sequence[float]) -> tuple[int, int]:
    """The block, 1-based and both included, over which harmful and harmless prompts come to part.

    Args:
        angles_harmless: per layer, the mean angle between the last-token inputs of pairs of harmless prompts.
        angles_harmful: the same between harmless and harmful ones.

    The source looks at the gap of the two curves: the block begins with the first layer after which the gap grows, and
    ends where it grows fastest no more.
    """
    gaps = [harmful - harmless for harmful, harmless in zip(angles_harmful, angles_harmless, strict=True)]
    growth = [after - before for before, after in itertools.pairwise(gaps)]
    if not growth or max(growth) <= 0:
        raise ValueError("angles: harmful and harmless prompts part in no layer")
    half = max(growth) / 2
    large = [number for number, value in enumerate(growth, start=1) if value >= half]
    return large[0], large[-1]


@training("sppft", "SPPFT", "ICLR 2025", strength="block", grid=((2, 2), (2, 3), (1, 2), (3, 3)))
def sppft(*, block: tuple[int, int] = (2, 3)) -> SPPFT:
    """SPPFT with the block of layers that stay."""
    first, last = block
    return SPPFT(first, last)
