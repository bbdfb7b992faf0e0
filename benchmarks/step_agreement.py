"""Whether two runs of a step came to the same result: retained columns counted one by one, weights compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .step_model import linear_weights

DIFFERENCE_LIMIT = 0.03
"""Of `Agreement.difference`. A column decided otherwise counts whole: 0.03 is one in some two thousand. Float32 may
differ where two scores are nearly equal, the gap between neighbours in rank being some 1e-4 of a score; an inverse
diagonal that were wrong by a percent would decide about one column in a hundred otherwise."""


@dataclass(frozen=True)
class Result:
    """The weights of a finished step and its retained columns by module name, both on the host."""

    weights: dict[str, Tensor]
    retained: dict[str, Tensor]

    @classmethod
    def of(cls, new: nn.Module, retained: dict[str, Tensor]) -> Result:
        """Copies of the weights of the model that the step changed."""
        weights = {name: weight.to("cpu", copy=True) for name, weight in linear_weights(new).items()}
        return cls(weights, retained)


@dataclass(frozen=True)
class Agreement:
    """What two results have in common.

    Attributes:
        columns, differing_columns: input columns of all linears, and those that only one of the two retained.
        linears, differing_linears: with at least one such column.
        difference: ``||W - W'||_F / ||W_new - W_old||_F`` over all linears, such columns included.
    """

    columns: int
    differing_columns: int
    linears: int
    differing_linears: int
    difference: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def compare(result: Result, new: nn.Module, retained: Mapping[str, Tensor], update_norm: float) -> Agreement:
    """A finished step against the one that `new` holds now.

    Args:
        retained: the columns that the step of `new` retained.
        update_norm: the Frobenius norm of the update over all linears, as `retune` returns it.

    Raises:
        ValueError: the two are not of the same linears.
    """
    weights = linear_weights(new)
    if not list(weights) == list(result.weights) == list(result.retained) == list(retained):
        raise ValueError("result: expected the linears of the other step, in their order")
    squares, counts = [], []
    for name, weight in weights.items():
        other = result.weights[name].to(weight.device)
        squares.append((weight.float() - other.float()).norm().double().square())
        counts.append(int((result.retained[name] ^ retained[name]).sum()))
    return Agreement(
        columns=sum(len(mask) for mask in retained.values()),
        differing_columns=sum(counts),
        linears=len(weights),
        differing_linears=sum(count > 0 for count in counts),
        difference=float(torch.stack(squares).sum().sqrt()) / update_norm,
    )
