"""What HPA needs of a layer's two Grams, checked and factored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramPair
from hpa_ext.gram_diagonal import AnyGram, GramDiagonal
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.ops._checks import describe


@dataclass(frozen=True)
class LayerGrams:
    """What a plan needs of a layer's two Grams: small, so that those of a whole model can be kept."""

    inverses: tuple[ops.InverseDiagonal, ops.InverseDiagonal]
    dead_columns: tuple[Tensor, Tensor]
    token_counts: tuple[int, int]

    def diagonals(self, dtype: torch.dtype) -> list[Tensor]:
        """The diagonals of both inverses ``[in]``."""
        return [inverse.diagonal.to(dtype) for inverse in self.inverses]


def read_grams(
    gram: GramPair | tuple[AnyGram, AnyGram],
    shape: tuple[int, int],
    device: torch.device,
    config: HPAConfig,
    *,
    check: bool = True,
    factored: dict[int, ops.InverseDiagonal] | None = None,
) -> LayerGrams:
    """Check the Grams of a weight of this shape ``(out, in)`` on this device, and factor them.

    `factored` keeps, by identity, what was factored for other layers: linears with one input share a Gram.
    """
    pair = _pair(gram)
    factored = {} if factored is None else factored
    names = ("gram.safety", "gram.task")
    for name, one in zip(names, pair, strict=True):
        _check_gram(name, one, shape, device)
    for name, one in zip(names, pair, strict=True):
        if id(one) not in factored:
            factored[id(one)] = _inverse(name, one, config, check)
    return LayerGrams(
        inverses=tuple(factored[id(one)] for one in pair),
        dead_columns=tuple(_dead_columns(one) for one in pair),
        token_counts=tuple(-1 if isinstance(one, Tensor) else one.token_count for one in pair),
    )


def _pair(gram: Any) -> tuple[AnyGram, AnyGram]:
    if not isinstance(gram, tuple) or len(gram) != 2:
        raise TypeError(f"gram: expected a GramPair or a tuple (safety, task), got {type(gram).__name__}")
    return gram


def _check_gram(name: str, gram: Any, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(gram, (Gram, GramDiagonal, Tensor)):
        raise TypeError(f"{name}: expected a Gram or a matrix [in, in], got {describe(gram)}")
    width = tuple(gram.shape) if isinstance(gram, Tensor) else (gram.in_features, gram.in_features)
    if width != (shape[1], shape[1]):
        raise ValueError(f"{name}: expected [{shape[1]}, {shape[1]}] for a weight {list(shape)}, got {list(width)}")
    if gram.device != device:
        raise ValueError(f"{name}: expected device {device} like the weights, got {gram.device}")


def _inverse(name: str, gram: AnyGram, config: HPAConfig, check: bool) -> ops.InverseDiagonal:
    try:
        if not isinstance(gram, Tensor):
            return gram.inverse_diagonal_report(
                config.damping, normalization=config.normalization, rescue=config.rescue
            )
        return ops.inverse_diagonal(gram, config.damping, rescue=config.rescue, check=check, return_report=True)
    except NumericalError as error:
        raise NumericalError(
            f"{name}: {error.message}", failing_minor=error.failing_minor, damping=error.damping
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _dead_columns(gram: AnyGram) -> Tensor:
    return gram.diagonal() == 0 if isinstance(gram, Tensor) else gram.dead_columns()
