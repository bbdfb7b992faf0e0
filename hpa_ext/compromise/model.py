"""The compromise on a whole model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import FullGram, check_full_gram
from hpa_ext.compromise.layer import LastInput, checked_config, merge, merge_lora, refuse_sharded
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport, report_warnings
from hpa_ext.hpa.model import embedding_warnings, layer_bar
from hpa_ext.hpa.naming import naming
from hpa_ext.hpa.pairs import check_counted, distinct, low_rank_of_pair, match, weights
from hpa_ext.interrupts import interrupt_held_back
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import experts_without_linears, find_linears
from hpa_ext.models.remembered import RememberedLinear, RememberedWeights
from hpa_ext.models.sharding import refuse_other_sharding
from hpa_ext.models.structure import unwrap


def harmonize_model(
    model_old: nn.Module | RememberedWeights,
    model_new: nn.Module,
    safety: Mapping[str, FullGram],
    task: Mapping[str, FullGram],
    config: CompromiseConfig | None = None,
    *,
    earlier: Sequence[Mapping[str, FullGram]] = (),
    modules: str | Iterable[str] | None = None,
    progress: bool = True,
) -> CompromiseReport:
    """The compromise for the linears of `model_new` with those of `model_old`, in place on `model_new`.

    Args:
        model_old, model_new, safety, task, modules, progress: as for `hpa_ext.hpa.harmonize_model`; the Grams must be
            whole ones, no `GramDiagonal`. A LoRA that is not merged counts and is absorbed into the base weights; if it
            is the only one, and the base that of `model_old`, its A is solved for as in `harmonize_adapter`.
        config: settings; None for the defaults.
        earlier: Grams by module name of earlier tasks, protected by ``config.earlier_strength``.

    Returns:
        A `CompromiseReport` with a `CompromiseLayerReport` for each weight. Prints as a table.

    Raises:
        TypeError, ValueError: the models, Grams or settings do not fit; the message starts with the module's name. So
            it is for models whose weights are DTensors.
        NumericalError: see `harmonize`.

    All weights are computed before the first is written, which takes the memory of a second copy of them: if anything
    raises, `model_new` is unchanged. Linears in a row that have the same Gram objects share the factor of a strength.
    """
    config = checked_config(config)
    for argument, model in (("model_old", model_old), ("model_new", model_new)):
        if not isinstance(model, nn.Module) and not (argument == "model_old" and isinstance(model, RememberedWeights)):
            raise TypeError(f"{argument}: expected an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.Module):
            refuse_other_sharding(argument, model)
    sides = {"safety": safety, "task": task} | {f"earlier[{i}]": grams for i, grams in enumerate(earlier)}
    for argument, grams in sides.items():
        if not isinstance(grams, Mapping):
            raise TypeError(f"{argument}: expected a mapping of module names to Grams, got {type(grams).__name__}")
    new_linears, shared = distinct(find_linears(model_new, modules))
    for name, linear in new_linears.items():
        refuse_sharded(f"{name}: model_new", linear.base_weight())
    is_remembered = isinstance(model_old, RememberedWeights)
    pairs = match(model_old.linears if is_remembered else find_linears(model_old, modules), new_linears, safety, task)
    for name in pairs:
        for argument, grams in sides.items():
            if name not in grams:
                raise ValueError(f"{name}: no Gram in {argument}")
            if isinstance(grams, dict):
                check_full_gram(f"{name}: {argument}", grams[name])
                check_counted(name, argument, grams[name])

    last = LastInput()
    merged: dict[str, Tensor] = {}
    reports: dict[str, CompromiseLayerReport] = {}
    for name, (old, new) in layer_bar(pairs, "compromise", progress):
        with naming(name):
            gram = safety[name], task[name]
            protected = [grams[name] for grams in earlier]
            merged[name], reports[name] = _merged(name, old, new, gram, protected, config, last)

    with interrupt_held_back():
        for name, (_, new) in pairs.items():
            new.base_weight().copy_(merged.pop(name))
            new.absorb_adapters()
    return CompromiseReport(
        layers=reports,
        config=config,
        shared=shared,
        not_covered=experts_without_linears(model_new),
        warnings=report_warnings(reports, config) + embedding_warnings(unwrap(model_new), pairs),
    )


def _merged(
    name: str,
    old: Linear | RememberedLinear,
    new: Linear,
    gram: tuple[FullGram, FullGram],
    earlier: Sequence[FullGram],
    config: CompromiseConfig,
    last: LastInput,
) -> tuple[Tensor, CompromiseLayerReport]:
    """The merged weight of one pair of linears, and its report."""
    update = low_rank_of_pair(old, new)
    if update is not None:
        compromise = last.of(gram, earlier, update.old, config)
        return merge_lora(compromise, update.old, (update.a, update.b, update.scaling), len(earlier), name)
    return merge(*weights(old, new), gram, config, earlier=earlier, name=name, last=last)
