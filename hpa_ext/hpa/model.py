"""HPA on a whole model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.errors import NumericalError
from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.pairs import distinct, match, weights
from hpa_ext.hpa.plan import LayerPlan, plan_layer
from hpa_ext.hpa.report import LayerReport, ModelReport
from hpa_ext.interrupts import interrupt_held_back
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import experts_without_linears, find_linears
from hpa_ext.models.structure import layer_depth, unwrap


def harmonize_model(
    model_old: nn.Module,
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
            the same linears. May be on another device; its weights are then moved one at a time.
        model_new: the model after it. A PeftModel with LoRA needs no merging first: its update counts, the harmonized
            weight is written into the base layer, and the adapter's B becomes zero, so that the PeftModel acts as the
            harmonized model (``merge_and_unload()`` gives the plain one) and can be tuned further. `model_old` may then
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
    """
    config = HPAConfig() if config is None else config
    if not isinstance(config, HPAConfig):
        raise TypeError(f"config: expected an HPAConfig, got {type(config).__name__}")
    for argument, model in (("model_old", model_old), ("model_new", model_new)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{argument}: expected an nn.Module, got {type(model).__name__}")
    for argument, grams in (("safety", safety), ("task", task)):
        if not isinstance(grams, Mapping):
            raise TypeError(f"{argument}: expected a mapping of module names to Grams, got {type(grams).__name__}")
    new_linears, shared = distinct(find_linears(model_new, modules))
    old_linears = find_linears(model_old, modules)
    pairs = match(old_linears, new_linears, safety, task)
    root = unwrap(model_new)

    plans: dict[str, LayerPlan] = {}
    reports: dict[str, LayerReport] = {}
    for name, (old, new, gram) in _bar(pairs, "score", progress):
        old_weight, new_weight = weights(old, new)
        try:
            plans[name] = plan_layer(old_weight, new_weight, gram, layer_depth(root, name), config)
        except NumericalError as error:
            raise error.in_module(name) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        reports[name] = plans[name].report(name)

    with interrupt_held_back():
        for name, (old, new, _) in _bar(pairs, "merge", progress):
            old_weight, new_weight = weights(old, new)
            plans[name].merge(old_weight, new_weight, out=new.base_weight())
            new.absorb_adapters()
    return ModelReport(
        layers=reports,
        config=config,
        shared=shared,
        not_covered=experts_without_linears(model_new),
        warnings=_warnings(reports, config) + _embedding_warnings(root, pairs),
    )


def _embedding_warnings(model: nn.Module, pairs: Mapping[str, tuple[Linear, Linear, GramPair]]) -> list[str]:
    """A line for each harmonized weight that is the input embedding as well."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    tied = [name for name, (_, new, _) in pairs.items() if new.base_weight().data_ptr() == weight.data_ptr()]
    return [f"{name} shares its weight with the input embedding, which has changed with it" for name in tied]


def _bar(pairs: dict, label: str, progress: bool) -> Iterable:
    return tqdm(pairs.items(), desc=label, unit="layer", leave=False, disable=None if progress else True)


def _warnings(reports: dict[str, LayerReport], config: HPAConfig) -> list[str]:
    """One line for each kind of rescue that a Gram needed, and one if there was nothing to harmonize."""
    lines = []
    for kind in ("safety", "task"):
        events = {
            "needed more damping": [n for n, report in reports.items() if report.damping_used[kind] > config.damping],
            "was factored in float64": [n for n, report in reports.items() if report.precision_bits[kind] == 64],
        }
        lines += [
            f"{kind} Gram {event} in {len(names)} {'layer' if len(names) == 1 else 'layers'}, such as {names[0]}"
            for event, names in events.items()
            if names
        ]
    if all(report.update_norm == 0 for report in reports.values()):
        lines.append("no weight differs between model_old and model_new, so nothing was harmonized")
    return lines
