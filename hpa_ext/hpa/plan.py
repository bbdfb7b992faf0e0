"""Score, select and adjust: everything that merging layers needs, computed without changing a weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpa_ext import ops
from hpa_ext.agreement import Agreement
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.decisions import grams_agree, plans_of_first
from hpa_ext.hpa.groups import indices_by, served_together
from hpa_ext.hpa.layer_grams import LayerGrams, read_grams
from hpa_ext.hpa.layer_plan import LayerPlan
from hpa_ext.hpa.naming import Naming, unnamed
from hpa_ext.hpa.scored import ScoredLayers
from hpa_ext.hpa.selection import ColumnScores, Selection, select
from hpa_ext.hpa.sharded import update_of
from hpa_ext.hpa.sums import UpdateSums, measure
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate
from hpa_ext.models.sharding import is_sharded
from hpa_ext.ops._checks import check_weight_pair


def plan_layers(
    olds: Sequence[Tensor],
    news: Sequence[Tensor],
    grams: Sequence[GramPair | tuple[AnyGram, AnyGram]],
    depths: Sequence[float],
    config: HPAConfig,
    *,
    naming: Naming = unnamed,
    check: bool = True,
) -> list[LayerPlan]:
    """Score and select for weights ``[out, in]``; with `check` False without reading anything on the host.

    DTensors are scored by all processes of their mesh together: if one of them raises, all do, and all get one plan.
    """
    sharded = [is_sharded(old) or is_sharded(new) for old, new in zip(olds, news, strict=True)]
    if not any(sharded):
        for index, (old, new) in enumerate(zip(olds, news, strict=True)):
            with naming(index):
                check_weight_pair(old, new)
        updates = [DenseUpdate(old, new) for old, new in zip(olds, news, strict=True)]
        return plan_updates(updates, grams, depths, config, naming=naming, check=check)
    plans = []
    for index, layer in enumerate(zip(olds, news, grams, depths, strict=True)):
        with naming(index):
            plans.append(_plan_sharded(*layer, config))
    return plans


def _plan_sharded(
    old: Tensor, new: Tensor, gram: GramPair | tuple[AnyGram, AnyGram], depth: float, config: HPAConfig
) -> LayerPlan:
    processes = Agreement.of_tensor(new if is_sharded(new) else old)
    with processes.together():
        update = update_of(old, new)
        config.retain_percent(depth)
        grams = [read_grams(gram, update.shape, update.device, config)]
    grams_agree(processes, {None: grams[0]}, config)
    sums = measure([update], grams, config)
    with processes.together():
        plan = plan_measured(sums, grams, [depth], config)[0]
    return plans_of_first(processes, {None: plan})[None]


def plan_updates(
    updates: Sequence[WeightUpdate],
    grams: Sequence[GramPair | tuple[AnyGram, AnyGram]],
    depths: Sequence[float],
    config: HPAConfig,
    *,
    naming: Naming = unnamed,
    check: bool = True,
) -> list[LayerPlan]:
    """As `plan_layers`, for updates in any form on one process."""
    for index, depth in enumerate(depths):
        with naming(index):
            config.retain_percent(depth)  # raises for a depth out of range, before any work
    read, factored = [], {}
    for index, (update, gram) in enumerate(zip(updates, grams, strict=True)):
        with naming(index):
            read.append(read_grams(gram, update.shape, update.device, config, check=check, factored=factored))
    sums = measure(updates, read, config, check=check)
    return plan_measured(sums, read, depths, config, naming=naming, check=check)


def plan_update(
    update: WeightUpdate, gram: GramPair | tuple[AnyGram, AnyGram], depth: float, config: HPAConfig
) -> LayerPlan:
    """As `plan_updates`, for one layer."""
    return plan_updates([update], [gram], [depth], config)[0]


def plan_measured(
    sums: Sequence[UpdateSums],
    grams: Sequence[LayerGrams],
    depths: Sequence[float],
    config: HPAConfig,
    *,
    naming: Naming = unnamed,
    check: bool = True,
) -> list[LayerPlan]:
    """Score and select from the sums; NumericalError for weights or scores that are not finite."""
    for index, of_layer in enumerate(sums):
        if of_layer.failure is not None:
            with naming(index):
                raise of_layer.failure
    alike = indices_by((s.shape, s.squared_update.dtype, s.squared_update.device) for s in sums)
    groups = [ScoredLayers.of([sums[i] for i in indices], [grams[i] for i in indices], config) for indices in alike]
    if check:
        failures = {
            indices[row]: error
            for group, indices in zip(groups, alike, strict=True)
            for row, error in group.failures().items()
        }
        for index in sorted(failures)[:1]:
            with naming(index):
                raise failures[index]
    scores = [
        ColumnScores(*group.scores, group.alpha, [depths[i] for i in indices])
        for group, indices in zip(groups, alike, strict=True)
    ]
    chosen: dict[int, list[Selection]] = {}
    for together in served_together([group.scores[0] for group in groups]):
        chosen.update(zip(together, select([scores[number] for number in together], config), strict=True))
    plans: dict[int, LayerPlan] = {}
    for number, (group, indices) in enumerate(zip(groups, alike, strict=True)):
        coefficients = group.coefficients(config, check=check).unbind()
        for index, selection, coefficient in zip(indices, chosen[number], coefficients, strict=True):
            plans[index] = LayerPlan(
                selection=selection,
                coefficient=coefficient,
                config=config,
                depth=depths[index],
                squared_update=sums[index].squared_update,
                old_squared_norm=sums[index].old_squared_norm,
                dead_columns=grams[index].dead_columns,
                inverses=grams[index].inverses,
                backend=_backend(sums[index], grams[index], config),
            )
    return [plans[index] for index in range(len(sums))]


def _backend(sums: UpdateSums, grams: LayerGrams, config: HPAConfig) -> dict[str, str]:
    found = dict(sums.backend)
    found["column_mask"] = ops.backend_of("column_mask", sums.squared_update)
    found["inverse_diagonal"] = ops.backend_of("inverse_diagonal", grams.inverses[0].diagonal)
    if config.granularity == "output":
        found["row_scores"] = "torch"
    return found
