"""The compromise on experts: each one's A is solved for, so that its outputs change least on what is protected."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport, report_warnings
from hpa_ext.compromise.solution import Compromise, UpdateRows
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import find_linears


def compromise_expert(
    base: nn.Module,
    expert: Expert,
    grams: Mapping[str, Mapping[str, Gram]],
    others: Mapping[str, Mapping[str, Gram]],
    shared: Collection[str],
    config: CompromiseConfig,
    progress: bool = True,
) -> tuple[Expert, CompromiseReport]:
    """The expert with ``A H_t (H_t + mu H_s + nu H_o)^-1`` in place of A: the same ranks, and no gain.

    Args:
        base: the plain base model, or a skeleton of it: its weights are not read. The arithmetic is done where they
            are, on the CPU for a skeleton.
        expert: of one task, checked against the base.
        grams: those of the safety set and those of the expert's task, in this order, by the name that errors give them;
            they have every module of the expert.
        others: Grams of other tasks, likewise, whose sum is H_o.
        shared: the modules in which the other tasks are protected; `others` have them.
        config: settings; ``earlier_strength`` is nu.
        progress: show a bar when stderr is a terminal.

    Raises:
        TypeError, ValueError: a Gram is not whole (`GramDiagonal`), counted no tokens, or has another width.
        NumericalError: A, B or a Gram holds NaN or Inf, the Grams cannot be factored, the new A overflows.

    Equal to `hpa_ext.harmonize_adapter` on the adapter, bit for bit where that is done on the same device.
    """
    linears = find_linears(base, list(expert.updates))
    updates = {name: expert.updates[name] for name in linears}
    parts = [
        (GramSources(dict(grams)), [name for name in updates if name not in shared]),
        (GramSources({**grams, **others}), [name for name in updates if name in shared]),
    ]
    for sources, names in parts:
        sources.check({name: updates[name].a.shape[1] for name in names})
    rows: dict[str, Tensor] = {}
    reports: dict[str, CompromiseLayerReport] = {}
    bar = tqdm(total=len(updates), desc=f"compromise {expert.task}", disable=not (progress and sys.stderr.isatty()))
    with bar:
        for sources, names in parts:
            for group in sources.groups(names):  # of one input: its Grams are in memory, and a factor is shared
                device = _device_of(linears[group[0]])
                compromise = sources.compromise(group[0], config, device, updates[group[0]].a.shape[1])
                for name in group:
                    rows[name], reports[name] = _solved(name, updates[name], compromise, sources.earlier_count)
                    bar.update()
    ordered = {name: reports[name] for name in updates}
    changed = {name: dataclasses.replace(update, a=rows[name]) for name, update in updates.items()}
    report = CompromiseReport(
        ordered, config, not_covered=list(expert.projector), warnings=report_warnings(ordered, config)
    )
    return Expert(expert.task, changed, dict(expert.projector)), report


def _solved(
    name: str, update: ExpertUpdate, compromise: Compromise, protected_count: int
) -> tuple[Tensor, CompromiseLayerReport]:
    """A of the compromise ``[r, in]`` in the dtype and on the device of the old one, and the report."""
    device = compromise.grams.device
    try:
        solution = compromise.solve(UpdateRows.of_lora(update.a.to(device), update.b.to(device), update.scaling))
    except NumericalError as error:
        raise error.in_module(name) from error
    a = solution.rows.to(update.a.dtype)
    if not bool(torch.isfinite(a).all()):
        raise NumericalError(f"the new A overflows {a.dtype}; pass the expert in float32", module=name)
    kept = a.to(update.a.device, copy=True)
    return kept, CompromiseLayerReport.of(name, solution, compromise, protected_count)


def _device_of(linear: Linear) -> torch.device:
    device = linear.base.weight.device
    return torch.device("cpu") if device.type == "meta" else device
