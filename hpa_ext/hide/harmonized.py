"""HPA on experts: each is harmonized for safety before it is fused or routed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.gram import Gram
from hpa_ext.hide.experts import Expert, ExpertUpdate, check_expert
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.low_rank import LowRankUpdate, gain_of
from hpa_ext.hpa.plan import plan_update
from hpa_ext.hpa.report import LayerReport
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import layer_depth, unwrap

Grams = Mapping[str, Gram | Tensor]


def harmonize_expert(
    base: nn.Module,
    expert: Expert,
    safety: Grams,
    task: Grams,
    config: HPAConfig | None = None,
    progress: bool = True,
) -> tuple[Expert, dict[str, LayerReport]]:
    """The expert whose layers are HPA's merge of the base with the base plus the expert.

    HPA gives ``W diag(g) + s B (A * (1 - m))`` with ``g = 1 - c (1 - m)`` (a column gain and a masked adapter), m being
    the columns that are retained. So the harmonized expert is the masked LoRA and the change of gain
    ``-c (1 - m)``: it can be fused and routed like any other, exactly.

    Args:
        base: the plain base model, whose weights are the ones before tuning; not changed, on any device.
        expert: of one task.
        safety: Grams of the safety set through the base model, by module name.
        task: Grams of the task's samples through the base with the expert.
        config: HPA's settings; None for the paper's. Only ``granularity="input"``, whose merge is a column mask.
        progress: show a bar when stderr is a terminal.

    Returns:
        The new expert, with the projector as it was, and a report for each module.

    Raises:
        ValueError: a Gram is missing, granularity "output", or the expert does not fit; named.
        NumericalError: as `hpa_ext.harmonize`.
    """
    config = HPAConfig() if config is None else config
    if config.granularity != "input":
        raise ValueError(f"config: expected granularity 'input' for an expert, got {config.granularity!r}")
    plain = unwrap(base)
    check_expert(expert, plain)
    for argument, grams in (("safety", safety), ("task", task)):
        missing = [name for name in expert.updates if name not in grams]
        if missing:
            raise ValueError(f"{argument}: expected a Gram for {missing[0]}, got none")
    linears = find_linears(plain, list(expert.updates))
    updates, reports = {}, {}
    bar = tqdm(linears.items(), desc=f"harmonize {expert.task}", disable=not (progress and sys.stderr.isatty()))
    for name, linear in bar:
        update = expert.updates[name]
        if update.gain_change is not None:
            raise ValueError(f"{name}: expected an expert that was not harmonized yet, got one with a gain")
        old = linear.base_weight()
        a, b = update.a.to(old.device), update.b.to(old.device)
        low_rank = LowRankUpdate(old, a, b, update.scaling)
        plan = plan_update(low_rank, (safety[name], task[name]), layer_depth(plain, name), config)
        retained = plan.selection.retained
        gain_change = (gain_of(retained, plan.coefficient, torch.float64) - 1).float().cpu()
        masked = torch.where(retained, torch.zeros((), dtype=a.dtype, device=a.device), a).to(update.a.device)
        kept = gain_change if bool(gain_change.any()) else None
        updates[name] = ExpertUpdate(masked, update.b, update.scaling, kept)
        reports[name] = plan.report(name)
    return Expert(expert.task, updates, dict(expert.projector)), reports


def harmonize_experts(
    base: nn.Module,
    experts: Sequence[Expert],
    safety: Grams,
    tasks: Mapping[str, Grams],
    config: HPAConfig | None = None,
    progress: bool = True,
) -> tuple[list[Expert], dict[str, dict[str, LayerReport]]]:
    """`harmonize_expert` on each, with the task Grams by task name; experts in the same order, reports by task."""
    missing = [expert.task for expert in experts if expert.task not in tasks]
    if missing:
        raise ValueError(f"tasks: expected Grams for task {missing[0]!r}, got {', '.join(tasks) or 'none'}")
    results, reports = [], {}
    for expert in experts:
        harmonized, reports[expert.task] = harmonize_expert(base, expert, safety, tasks[expert.task], config, progress)
        results.append(harmonized)
    return results, reports
