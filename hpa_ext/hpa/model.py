"""HPA on a whole model in memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramPair
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.layer import LayerPlan, plan_layer
from hpa_ext.hpa.report import LayerReport, ModelReport
from hpa_ext.models.linears import Linear, experts_without_linears, find_linears
from hpa_ext.models.structure import layer_depth, unwrap


def harmonize_model(
    model_old: nn.Module,
    model_new: nn.Module,
    safety: Mapping[str, Gram | Tensor],
    task: Mapping[str, Gram | Tensor],
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
    new_linears, shared = _distinct(find_linears(model_new, modules))
    old_linears = find_linears(model_old, modules)
    pairs = _match(old_linears, new_linears, safety, task)
    root = unwrap(model_new)

    plans: dict[str, LayerPlan] = {}
    reports: dict[str, LayerReport] = {}
    for name, (old, new, gram) in _bar(pairs, "score", progress):
        old_weight, new_weight = _weights(old, new)
        try:
            plans[name] = plan_layer(old_weight, new_weight, gram, layer_depth(root, name), config)
        except NumericalError as error:
            raise error.in_module(name) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        reports[name] = plans[name].report(name)

    with _interrupt_held_back():
        for name, (old, new, _) in _bar(pairs, "merge", progress):
            old_weight, new_weight = _weights(old, new)
            plans[name].merge(old_weight, new_weight, out=new.base_weight())
            new.absorb_adapters()
    return ModelReport(
        layers=reports,
        config=config,
        shared=shared,
        not_covered=experts_without_linears(model_new),
        warnings=_warnings(reports, config) + _embedding_warnings(root, pairs),
    )


def _distinct(linears: dict[str, Linear]) -> tuple[dict[str, Linear], dict[str, str]]:
    """The first linear of each stored weight, and for the others the name of that first one."""
    first: dict[int, str] = {}
    distinct: dict[str, Linear] = {}
    shared: dict[str, str] = {}
    for name, linear in linears.items():
        linear.refuse_unsupported()
        key = linear.base.weight.data_ptr()
        if key in first:
            if linear.has_pending_adapters() or distinct[first[key]].has_pending_adapters():
                raise ValueError(
                    f"{name}: shares its weight with {first[key]}, and an adapter changes only one of them; "
                    "call merge_and_unload() with untied weights and pass the plain model"
                )
            shared[name] = first[key]
        else:
            first[key] = name
            distinct[name] = linear
    return distinct, shared


def _match(
    old: dict[str, Linear],
    new: dict[str, Linear],
    safety: Mapping[str, Gram | Tensor],
    task: Mapping[str, Gram | Tensor],
) -> dict[str, tuple[Linear, Linear, GramPair]]:
    """Old and new linear and Grams for each name; raises before any work if something is missing."""
    pairs = {}
    for name, linear in new.items():
        if name not in old:
            raise ValueError(f"{name}: is in model_new but not in model_old")
        if linear.original is not None and old[name].module is linear.module:
            old[name] = Linear(name, linear.original)  # the base of an adapted model holds the trained copy too
        old[name].refuse_unsupported()
        if old[name].base_weight().data_ptr() == linear.base_weight().data_ptr() and not linear.has_pending_adapters():
            if any(other.has_pending_adapters() or other.original is not None for other in new.values()):
                continue  # the base of an adapted model, in a layer that the adapter leaves alone: nothing changed
            raise ValueError(
                f"{name}: model_old and model_new share this weight, so the one before tuning is lost; "
                "keep a copy of the model, or pass a PeftModel whose adapter is not merged"
            )
        for argument, grams in (("safety", safety), ("task", task)):
            if name not in grams:
                some = f"; it has {len(grams)} names, such as {next(iter(grams))}" if grams else "; it is empty"
                raise ValueError(f"{name}: no Gram in {argument}{some}")
            if isinstance(grams[name], Gram) and grams[name].token_count == 0:
                raise ValueError(
                    f"{name}: its Gram in {argument} has counted no tokens: no batch reached this module; "
                    "leave it out with modules="
                )
        pairs[name] = (old[name], linear, GramPair(safety[name], task[name]))
    return pairs


def _weights(old: Linear, new: Linear) -> tuple[Tensor, Tensor]:
    """Old and new weight ``[out, in]`` on the new one's device."""
    new_weight = new.weight()
    # With the base of the tuned PeftModel itself as the old model, the wrapper's own update must not count as old.
    old_weight = old.base_weight() if old.module is new.module else old.weight()
    return old_weight.to(new_weight.device), new_weight


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Within the context Ctrl-C waits; a model with some layers merged and others not is of no use to anybody."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


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
