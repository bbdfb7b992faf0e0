"""The library's closed-form compromise as a method: by a strength or a budget, with or without earlier tasks."""

from __future__ import annotations

from torch import Tensor

from hpa_ext.compromise import CompromiseConfig, harmonize
from hpa_ext.compromise.config import DEFAULT_BUDGET, DEFAULT_EARLIER_STRENGTH
from hpa_ext.gram import GramPair

from .layer import LayerContext
from .registry import post_training

_SOURCE = "this library, form of RegMean (ICLR 2023)"
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
_BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.4)
_EARLIER = {"earlier_strength": DEFAULT_EARLIER_STRENGTH}


@post_training("compromise", "Compromise", _SOURCE, strength="strength", grid=_STRENGTHS)
@post_training(
    "compromise-earlier",
    "Compromise, earlier tasks",
    _SOURCE,
    settings=_EARLIER,
    strength="strength",
    grid=_STRENGTHS,
    needs=("earlier-grams",),
)
def compromise(
    old: Tensor,
    new: Tensor,
    layer: LayerContext,
    *,
    strength: float = 1.0,
    earlier_strength: float = DEFAULT_EARLIER_STRENGTH,
    damping: float = 0.01,
    safety_damping: float | None = None,
    memory: str = "triangle",
    memory_rank: int = 64,
) -> Tensor:
    """The compromise ``[out, in]`` at a strength mu; its report is appended to ``layer.records``.

    ``memory`` and ``memory_rank`` say in what form ``layer.earlier`` was kept (see `EarlierGrams`).
    """
    config = CompromiseConfig(strength, None, damping, safety_damping, earlier_strength)
    return _merged(old, new, layer, config)


@post_training("compromise-budget", "Compromise, budget", _SOURCE, strength="budget", grid=_BUDGETS)
@post_training(
    "compromise-budget-earlier",
    "Compromise, budget, earlier tasks",
    _SOURCE,
    settings=_EARLIER,
    strength="budget",
    grid=_BUDGETS,
    needs=("earlier-grams",),
)
@post_training(
    "compromise-low-rank",
    "Compromise, earlier tasks, rank 64",
    _SOURCE,
    settings={**_EARLIER, "memory": "low-rank", "memory_rank": 64},
    group="control",
    needs=("earlier-grams",),
)
@post_training(
    "compromise-diagonal",
    "Compromise, earlier tasks, diagonal",
    _SOURCE,
    settings={**_EARLIER, "memory": "diagonal"},
    group="control",
    needs=("earlier-grams",),
)
@post_training(
    "compromise-sequential",
    "Compromise, layer by layer (RegMean++)",
    "this library, form of RegMean++ (2025)",
    group="control",
    needs=("sequential",),
)
def compromise_budget(
    old: Tensor,
    new: Tensor,
    layer: LayerContext,
    *,
    budget: float = DEFAULT_BUDGET,
    earlier_strength: float = DEFAULT_EARLIER_STRENGTH,
    damping: float = 0.01,
    safety_damping: float | None = None,
    memory: str = "triangle",
    memory_rank: int = 64,
) -> Tensor:
    """As `compromise`, with the smallest strength that leaves this share of tuning's change on the safety set."""
    config = CompromiseConfig(None, budget, damping, safety_damping, earlier_strength)
    return _merged(old, new, layer, config)


def _merged(old: Tensor, new: Tensor, layer: LayerContext, config: CompromiseConfig) -> Tensor:
    earlier = () if layer.earlier is None else (layer.earlier,)
    pair = GramPair(layer.safety, layer.task)
    weight, report = harmonize(old, new, pair, layer.depth, config, earlier=earlier, return_report=True)
    layer.records.append(report)
    return weight
