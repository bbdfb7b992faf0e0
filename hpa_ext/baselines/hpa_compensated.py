"""HPA's columns with compensation: what retaining a column costs is made up for by others, as in Safe Delta."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.gram import GramPair
from hpa_ext.hpa import HPAConfig, harmonize

from .layer import LayerContext, damped, inverse
from .registry import post_training

_SOURCE = "HPA's selection, OBS compensation"


@post_training("hpa-compensated", "HPA, compensated on the task", _SOURCE, group="ablation")
@post_training(
    "hpa-compensated-safety",
    "HPA, compensated on safety",
    _SOURCE,
    settings={"compensation": "safety"},
    group="ablation",
)
@post_training(
    "hpa-gram-alone",
    "HPA, scores from the Gram alone",
    "HPA's form without the squared update in the scores",
    settings={"compensation": "none", "scores": "gram"},
    group="ablation",
)
def hpa_compensated(
    old: Tensor,
    new: Tensor,
    layer: LayerContext,
    *,
    compensation: str = "task",
    scores: str = "hpa",
    damping: float = 0.01,
) -> Tensor:
    """New with the columns that HPA retains, the others or the retained ones making up for it, ``[out, in]``.

    Args:
        old, new: weights before and after tuning; D is their difference, R the retained columns, F the others.
        layer: its Grams.
        compensation: "task": the retained columns are old, and the others take over what they did on the task's
            samples, ``X_F = D_F + D_R H_RF H_FF^-1`` with ``H_t``. "safety": the others are new, and the retained ones
            undo what those change on the safety samples, ``X_R = -D_F H_FR H_RR^-1`` with ``H_s``, the OBS compensation
            of Safe Delta. "none": neither.
        scores: "hpa" for HPA's selection; "gram" for as many columns of the largest ``1 / [H_s^-1]_jj``, whatever
            tuning changed there.
        damping: of both Grams, relative to the mean of their diagonals.

    Without HPA's orthogonal adjustment, which is another change of the same update.
    """
    if compensation not in ("task", "safety", "none"):
        raise ValueError(f"compensation: expected 'task', 'safety' or 'none', got {compensation!r}")
    if scores not in ("hpa", "gram"):
        raise ValueError(f"scores: expected 'hpa' or 'gram', got {scores!r}")
    config = HPAConfig(orthogonal=False, damping=damping)
    pair = GramPair(layer.safety, layer.task)
    _, report = harmonize(old, new, pair, layer.depth, config, return_report=True)
    retained = report.retained.to(old.device)
    if scores == "gram":
        importance = 1 / inverse(layer.safety, damping).diagonal()
        chosen = importance.argsort(descending=True, stable=True)[: int(retained.sum())]
        retained = torch.zeros_like(retained).index_fill_(0, chosen, True)
    update = (new - old).double()
    kept = update * ~retained
    if compensation == "task":
        gram = damped(layer.task, damping)
        cross, among = gram[retained][:, ~retained], gram[~retained][:, ~retained]
        kept[:, ~retained] += torch.linalg.solve(among, cross.mT @ update[:, retained].mT).mT
    elif compensation == "safety":
        gram = damped(layer.safety, damping)
        cross, among = gram[~retained][:, retained], gram[retained][:, retained]
        kept[:, retained] = -torch.linalg.solve(among, cross.mT @ update[:, ~retained].mT).mT
    return (old.double() + kept).to(new.dtype)
