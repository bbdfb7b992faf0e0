"""HPA on a whole model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.agreement import Agreement
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.decisions import grams_agree, plans_of_first
from hpa_ext.hpa.groups import batches
from hpa_ext.hpa.layer_grams import LayerGrams, read_grams
from hpa_ext.hpa.layer_plan import LayerPlan, merge_updates, reports_of
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.naming import naming
from hpa_ext.hpa.pairs import Pair, check_counted, distinct, match, refuse_overlaps, update_of_pair, weights
from hpa_ext.hpa.plan import plan_measured
from hpa_ext.hpa.report import ModelReport, report_warnings
from hpa_ext.hpa.sharded import update_of
from hpa_ext.hpa.sums import UpdateSums, measure
from hpa_ext.interrupts import interrupt_held_back
from hpa_ext.models.linears import experts_without_linears, find_linears
from hpa_ext.models.remembered import RememberedWeights
from hpa_ext.models.sharding import is_sharded, local, refuse_other_sharding, reshard
from hpa_ext.models.structure import layer_depth, unwrap

BATCH_BYTES = 1 << 30
"""Of weights that are scored or merged at once: large enough that a launch costs nothing, small enough that copies (of
weights on another device, or with an adapter on top) and the steps of the bar stay small."""


def harmonize_model(
    model_old: nn.Module | RememberedWeights,
    model_new: nn.Module,
    safety: Mapping[str, AnyGram],
    task: Mapping[str, AnyGram],
    config: HPAConfig | None = None,
    *,
    modules: str | Iterable[str] | None = None,
    progress: bool = True,
) -> ModelReport:
    """Harmonize the linears of `model_new` with those of `model_old`, in place on `model_new`.

    Args:
        model_old: the model before the tuning step: a transformers model (LLaVA or any causal LM), or any module with
            the same linears. May be on another device; its weights are then moved some at a time, half a GiB at most
            (or one). Or `RememberedWeights`, copies of the weights that `model_new` had before the step.
        model_new: the model after it. A PeftModel with LoRA needs no merging first: its update counts, the harmonized
            weight is written into the base layer, and the adapter's B becomes zero, so that the PeftModel acts as the
            harmonized model (``merge_and_unload()`` gives the plain one) and can be tuned further. Where one LoRA is
            all that changed, no new weight is formed, which spares 16-bit weights a rounding. `model_old` may then
            be the same model's ``get_base_model()``; its safety Grams must then be made inside
            ``with model_new.disable_adapter():``, because the base model runs the adapter too.
        safety, task: Grams (or matrices) by module name, as `calibrate` returns them.
        config: settings; None for the paper's.
        modules: a regular expression that must match a whole module name, or names; None for every linear of the
            language model's decoder.
        progress: show a bar when stderr is a terminal.

    Returns:
        A `ModelReport` with a `LayerReport` for each weight. Prints as a table.

    Raises:
        TypeError, ValueError: the models, Grams or settings do not fit; the message starts with the module's name.
        NumericalError: a weight or Gram holds NaN or Inf, or a Gram cannot be factored.

    Every layer is scored before the first weight is written: if anything raises, `model_new` is unchanged, and Ctrl-C
    takes effect before the first weight or after the last. Weights that several modules share are handled once, under
    the first name.

    A model under FSDP2 (``fully_shard``, HSDP too) is harmonized by all of its processes together; each must call this
    with Grams of all samples (``grams.all_reduce_()``), and gets the same report. No weight is gathered: each process
    scores and writes its own part, and a layer takes one all-reduce of a vector and two scalars (two with output
    granularity; the factors of a LoRA are gathered). `model_old` is then sharded in the same way, or the whole model on
    every process. Whatever raises on one process raises on all.
    """
    config = HPAConfig() if config is None else config
    if not isinstance(config, HPAConfig):
        raise TypeError(f"config: expected an HPAConfig, got {type(config).__name__}")
    for argument, model in (("model_old", model_old), ("model_new", model_new)):
        if not isinstance(model, nn.Module) and not (argument == "model_old" and isinstance(model, RememberedWeights)):
            raise TypeError(f"{argument}: expected an nn.Module, got {type(model).__name__}")
    for argument, grams in (("safety", safety), ("task", task)):
        if not isinstance(grams, Mapping):
            raise TypeError(f"{argument}: expected a mapping of module names to Grams, got {type(grams).__name__}")
    refuse_other_sharding("model_new", model_new)
    models = [model_new]
    if isinstance(model_old, nn.Module):
        refuse_other_sharding("model_old", model_old)
        models.append(model_old)
    for model in models:
        reshard(model)
    processes = Agreement.of_model(*models)
    root = unwrap(model_new)

    # Sharded models: what one process finds wrong must end all, so work that may fail stands apart from exchanges.
    grams: dict[str, LayerGrams] = {}
    with processes.together():
        new_linears, shared = distinct(find_linears(model_new, modules))
        old_linears = (
            model_old.linears if isinstance(model_old, RememberedWeights) else find_linears(model_old, modules)
        )
        pairs = match(old_linears, new_linears, safety, task)
        refuse_overlaps(pairs)
        for name, (_, new) in layer_bar(pairs, "Grams", progress):
            with naming(name):
                base, pair = new.base_weight(), GramPair(safety[name], task[name])
                check_counted(name, "safety", pair.safety)
                check_counted(name, "task", pair.task)
                grams[name] = read_grams(pair, tuple(base.shape), local(base).device, config)
    grams_agree(processes, grams, config)

    names = list(pairs)
    kept = [grams[name] for name in names]
    sums: list[UpdateSums] = []
    low_rank: dict[str, LowRankUpdate] = {}
    with layer_bar(pairs, "score", progress) as bar:
        for batch in weight_batches(pairs):
            loaded = []
            for name in batch:
                with naming(name):
                    loaded.append(update_of_pair(*pairs[name]))
            sums += measure(loaded, [grams[name] for name in batch], config)
            low_rank |= {name: u for name, u in zip(batch, loaded, strict=True) if isinstance(u, LowRankUpdate)}
            bar.update(len(batch))

    with processes.together():
        depths = [layer_depth(root, name) for name in names]
        planned = plan_measured(sums, kept, depths, config, naming=lambda index: naming(names[index]))
    plans = plans_of_first(processes, dict(zip(names, planned, strict=True)))
    reports = dict(zip(plans, reports_of(list(plans.values()), list(plans)), strict=True))

    with interrupt_held_back(), layer_bar(pairs, "merge", progress) as bar:
        for batch in weight_batches(pairs):
            write_merged({name: pairs[name] for name in batch}, plans, low_rank)
            bar.update(len(batch))
    return ModelReport(
        layers=reports,
        config=config,
        shared=shared,
        not_covered=experts_without_linears(model_new),
        warnings=report_warnings(reports, config) + embedding_warnings(root, pairs),
    )


def weight_batches(pairs: Mapping[str, Pair]) -> Iterator[list[str]]:
    """Names of layers that are scored, or merged, at once: old and new weights of at most `BATCH_BYTES`.

    Of sharded weights all bytes count, so that every process makes the same batches.
    """
    wholes = [new.base_weight() for _, new in pairs.values()]
    return batches(pairs, [2 * whole.numel() * whole.element_size() for whole in wholes], BATCH_BYTES)


def write_merged(
    pairs: Mapping[str, Pair], plans: Mapping[str, LayerPlan], low_rank: Mapping[str, LowRankUpdate]
) -> None:
    """Write the harmonized weights of these layers into the new model; `low_rank` has those that are a LoRA alone."""
    updates = [low_rank.get(name) or update_of(*weights(*pair)) for name, pair in pairs.items()]
    merge_updates([plans[name] for name in pairs], updates, [new.base_weight() for _, new in pairs.values()])
    for _, new in pairs.values():
        new.absorb_adapters()


def embedding_warnings(model: nn.Module, pairs: Mapping[str, Pair]) -> list[str]:
    """A line for each harmonized weight that is the input embedding as well."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    key = id(weight) if is_sharded(weight) else weight.data_ptr()
    tied = [name for name, (_, new) in pairs.items() if new.storage_key == key]
    return [f"{name} shares its weight with the input embedding, which has changed with it" for name in tied]


def layer_bar(pairs: Mapping[str, Pair], label: str, progress: bool) -> tqdm:
    """The pairs, with a bar when stderr is a terminal."""
    return tqdm(pairs.items(), desc=label, unit="layer", leave=False, disable=None if progress else True)
