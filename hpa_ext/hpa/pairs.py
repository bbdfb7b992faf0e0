"""Which old and new layer and Grams belong together; everything that can be refused before work starts is, here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hpa_ext.gram import GramPair
from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.models.linear import Linear


def distinct(linears: dict[str, Linear]) -> tuple[dict[str, Linear], dict[str, str]]:
    """The first linear of each stored weight, and for the others the name of that first one."""
    first: dict[int, str] = {}
    chosen: dict[str, Linear] = {}
    shared: dict[str, str] = {}
    for name, linear in linears.items():
        linear.refuse_unsupported()
        key = linear.base.weight.data_ptr()
        if key in first:
            if linear.has_pending_adapters() or chosen[first[key]].has_pending_adapters():
                raise ValueError(
                    f"{name}: shares its weight with {first[key]}, and an adapter changes only one of them; "
                    "call merge_and_unload() with untied weights and pass the plain model"
                )
            shared[name] = first[key]
        else:
            first[key] = name
            chosen[name] = linear
    return chosen, shared


def match(
    old: dict[str, Linear],
    new: dict[str, Linear],
    safety: Mapping[str, AnyGram],
    task: Mapping[str, AnyGram],
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
            if not isinstance(grams[name], Tensor) and grams[name].token_count == 0:
                raise ValueError(
                    f"{name}: its Gram in {argument} has counted no tokens: no batch reached this module; "
                    "leave it out with modules="
                )
        pairs[name] = (old[name], linear, GramPair(safety[name], task[name]))
    return pairs


def weights(old: Linear, new: Linear) -> tuple[Tensor, Tensor]:
    """Old and new weight ``[out, in]`` on the new one's device."""
    new_weight = new.weight()
    # With the base of the tuned PeftModel itself as the old model, the wrapper's own update must not count as old.
    old_weight = old.base_weight() if old.module is new.module else old.weight()
    return old_weight.to(new_weight.device), new_weight
