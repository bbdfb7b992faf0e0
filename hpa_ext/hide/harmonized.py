"""Experts harmonized for safety, each before it is fused or routed: by HPA, or by the compromise."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from tqdm import tqdm

from hpa_ext.compromise import CompromiseConfig, CompromiseReport
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hide.checks import check_top_layers
from hpa_ext.hide.compromised import compromise_expert
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.experts import Expert, ExpertUpdate, check_expert
from hpa_ext.hide.structure import layer_number
from hpa_ext.hpa.checkpoint.grams import open_grams
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.low_rank import LowRankUpdate, gain_of
from hpa_ext.hpa.plan import plan_update
from hpa_ext.hpa.report import LayerReport
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import layer_depth, unwrap
from hpa_ext.ops._checks import describe

Grams = str | os.PathLike[str] | Mapping[str, AnyGram]
Config = HPAConfig | CompromiseConfig
ExpertReport = dict[str, LayerReport] | CompromiseReport


def harmonize_experts(
    base: nn.Module,
    experts: Sequence[Expert],
    safety: Grams,
    tasks: Mapping[str, Grams],
    config: Config | None = None,
    progress: bool = True,
    *,
    protect_others: HiDeConfig | None = None,
) -> tuple[list[Expert], dict[str, ExpertReport]]:
    """`harmonize_expert` on each.

    Args:
        base, safety, config, progress: see `harmonize_expert`.
        experts: of the tasks.
        tasks: the task Grams by task name. There may be more tasks than experts.
        protect_others: for the compromise alone: the settings of the model that the experts are for. In the linears
            that it fuses, where every expert acts on the samples of every task, an expert then also keeps the base's
            outputs on those of all other tasks in `tasks`: ``A H_t (H_t + mu H_s + nu sum_o H_o)^-1`` takes the place
            of A, nu being ``config.earlier_strength``. With nu = 1, one strength for all and fusion coefficients of 1
            their sum is RegMean's merge of the tuned models and the base.

    Returns:
        Experts in the same order, and reports by task.

    Raises:
        TypeError, ValueError, NumericalError: as `harmonize_expert`; a task of an expert is missing in `tasks`;
            `protect_others` is no HiDeConfig, has more top layers than the base, or comes with HPA, which has no place
            for it.
    """
    config = _checked_config(config)
    if protect_others is not None:
        _check_protection(base, protect_others, config)
    missing = [expert.task for expert in experts if expert.task not in tasks]
    if missing:
        raise ValueError(f"tasks: expected Grams for task {missing[0]!r}, got {', '.join(tasks) or 'none'}")
    results, reports = [], {}
    for expert in experts:
        others = {task: grams for task, grams in tasks.items() if task != expert.task}
        found = _harmonized(base, expert, safety, tasks[expert.task], config, progress, others, protect_others)
        results.append(found[0])
        reports[expert.task] = found[1]
    return results, reports


def harmonize_expert(
    base: nn.Module,
    expert: Expert,
    safety: Grams,
    task: Grams,
    config: Config | None = None,
    progress: bool = True,
) -> tuple[Expert, ExpertReport]:
    """An expert that keeps more of the base's safety; it can be fused and routed like any other, exactly.

    *HPA* gives ``W diag(g) + s B (A * (1 - m))`` with ``g = 1 - c (1 - m)`` (a column gain and a masked adapter), m
    being the columns that are retained: the masked LoRA and the change of gain ``-c (1 - m)``. *The compromise* gives
    ``W + s B A H_t (H_t + mu H_s)^-1``: another A of the same rank, and no gain, so that a plain PEFT adapter holds it.

    Args:
        base: the plain base model, whose weights are the ones before tuning; not changed, on any device. The compromise
            does not read them.
        expert: of one task.
        safety: Grams of the safety set through the base model: by module name, or the path of a Gram file. HPA takes
            matrices ``[in, in]`` and `GramDiagonal`, too.
        task: Grams of the task's samples through the base with the expert.
        config: an `HPAConfig` (with ``granularity="input"``, whose merge is a column mask), or a `CompromiseConfig`;
            None for HPA's defaults.
        progress: show a bar when stderr is a terminal.

    Returns:
        The new expert, with the projector as it was, and a `LayerReport` by module name, or a `CompromiseReport`.

    Raises:
        TypeError, ValueError: a Gram is missing, granularity "output", the expert does not fit, or was harmonized
            by HPA before; a `GramDiagonal` for the compromise; named.
        NumericalError: as `hpa_ext.harmonize`.
    """
    return _harmonized(base, expert, safety, task, _checked_config(config), progress)


def _harmonized(
    base: nn.Module,
    expert: Expert,
    safety: Grams,
    task: Grams,
    config: Config,
    progress: bool,
    others: Mapping[str, Grams] = MappingProxyType({}),
    fused_by: HiDeConfig | None = None,
) -> tuple[Expert, ExpertReport]:
    """By the settings' method; with the Grams of other tasks, to be protected where `fused_by` fuses."""
    if isinstance(config, HPAConfig) and config.granularity != "input":
        raise ValueError(f"config: expected granularity 'input' for an expert, got {config.granularity!r}")
    plain = unwrap(base)
    check_expert(expert, plain)
    shared: list[str] = []
    if fused_by is not None:
        shared = [name for name in expert.updates if fused_by.role(*layer_number(plain, name)) == "fused"]
    named = {argument: open_grams(argument, grams) for argument, grams in (("safety", safety), ("task", task))}
    protected = {}
    if shared:
        protected = {f"tasks[{name!r}]": open_grams(f"tasks[{name!r}]", grams) for name, grams in others.items()}
    for argument, grams in (named | protected).items():
        missing = [name for name in (expert.updates if argument in named else shared) if name not in grams]
        if missing:
            raise ValueError(f"{argument}: expected a Gram for {missing[0]}, got none")
    for name, update in expert.updates.items():
        if update.gain_change is not None:
            raise ValueError(f"{name}: expected an expert that was not harmonized yet, got one with a gain")
    if isinstance(config, CompromiseConfig):
        return compromise_expert(plain, expert, named, protected, shared, config, progress)
    return _by_hpa(plain, expert, named["safety"], named["task"], config, progress)


def _by_hpa(
    plain: nn.Module,
    expert: Expert,
    safety: Mapping[str, AnyGram],
    task: Mapping[str, AnyGram],
    config: HPAConfig,
    progress: bool,
) -> tuple[Expert, dict[str, LayerReport]]:
    linears = find_linears(plain, list(expert.updates))
    updates, reports = {}, {}
    bar = tqdm(linears.items(), desc=f"harmonize {expert.task}", disable=not (progress and sys.stderr.isatty()))
    for name, linear in bar:
        update = expert.updates[name]
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


def _check_protection(base: nn.Module, protect_others: HiDeConfig, config: Config) -> None:
    """Refuse settings of the protection that do not fit."""
    if not isinstance(protect_others, HiDeConfig):
        raise TypeError(f"protect_others: expected a HiDeConfig or None, got {describe(protect_others)}")
    if not isinstance(config, CompromiseConfig):
        raise ValueError(
            "protect_others: expected None with HPA, which has no place for Grams of other tasks, or else a "
            "CompromiseConfig beside it, got a HiDeConfig"
        )
    check_top_layers(unwrap(base), protect_others)


def _checked_config(config: Config | None) -> Config:
    """The settings, HPA's defaults for None; TypeError for anything else."""
    config = HPAConfig() if config is None else config
    if not isinstance(config, (HPAConfig, CompromiseConfig)):
        raise TypeError(f"config: expected an HPAConfig or a CompromiseConfig, got {describe(config)}")
    return config
