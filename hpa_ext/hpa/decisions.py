"""One decision for all processes that share a model: nobody may retain other columns than its neighbour."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hpa_ext.agreement import Agreement
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.layer_grams import LayerGrams

if TYPE_CHECKING:
    from hpa_ext.hpa.layer_plan import LayerPlan

# Far above what machines differ by in factoring one Gram, far below what the samples of one process differ by.
_TOLERANCE = 1e-3


def grams_agree(processes: Agreement, grams: Mapping[str | None, LayerGrams], config: HPAConfig) -> None:
    """Raise ValueError on every process unless all have the same layers, settings and Grams.

    Grams of each process's own samples, which somebody forgot to add up, are found here.
    """
    if processes.is_alone:
        return
    settings = zlib.crc32(json.dumps([list(grams), config.to_dict()]).encode())
    first = processes.of_first(torch.tensor([len(grams), settings]))
    with processes.together():
        if first.tolist() != [len(grams), settings]:
            raise ValueError(
                f"modules, config: expected the same {int(first[0])} layers and settings as the first process, "
                f"got {len(grams)} layers or other settings"
            )
    if not grams:
        return
    facts = torch.tensor([_facts(layer) for layer in grams.values()], dtype=torch.float64)
    of_first = processes.of_first(facts)
    with processes.together():
        for name, ours, theirs in zip(grams, facts, of_first, strict=True):
            for index, kind in enumerate(("safety", "task")):
                (tokens, mean), (first_tokens, first_mean) = ours[index].tolist(), theirs[index].tolist()
                if tokens != first_tokens or abs(mean - first_mean) > _TOLERANCE * abs(first_mean):
                    raise ValueError(
                        (f"{name}: " if name else "")
                        + f"gram.{kind}: expected the same Gram on every process, got {tokens:.0f} tokens and a mean "
                        f"inverse diagonal of {mean:.6g}, but {first_tokens:.0f} and {first_mean:.6g} on the first "
                        "process; call all_reduce_() on the Grams of each process's samples first"
                    )


def plans_of_first(processes: Agreement, plans: Mapping[str | None, LayerPlan]) -> dict[str | None, LayerPlan]:
    """The plans with the masks, alpha and coefficient of the first process, so that all decide the same."""
    if processes.is_alone or not plans:
        return dict(plans)
    chosen = [plan.selection for plan in plans.values()]
    masks = [torch.stack([s.retained, s.safety_columns, s.task_columns]).cpu() for s in chosen]
    numbers = [torch.stack([p.selection.alpha.double().cpu(), p.coefficient.double().cpu()]) for p in plans.values()]
    flat = processes.of_first(torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)).bool()
    scalars = processes.of_first(torch.stack(numbers))
    result = {}
    pieces = flat.split([mask.numel() for mask in masks])
    for (name, plan), piece, (alpha, coefficient) in zip(plans.items(), pieces, scalars, strict=True):
        device = plan.selection.retained.device
        retained, safety, task = piece.view(3, -1).to(device).unbind()
        selection = dataclasses.replace(
            plan.selection,
            retained=retained.contiguous(),
            safety_columns=safety.contiguous(),
            task_columns=task.contiguous(),
            alpha=alpha.to(plan.selection.alpha),
        )
        result[name] = dataclasses.replace(plan, selection=selection, coefficient=coefficient.to(plan.coefficient))
    return result


def _facts(layer: LayerGrams) -> list[list[float]]:
    return [
        [float(tokens), float(inverse.diagonal.double().mean())]
        for tokens, inverse in zip(layer.token_counts, layer.inverses, strict=True)
    ]
