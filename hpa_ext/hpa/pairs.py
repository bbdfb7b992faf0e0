"""Which old and new layer belong together; everything that can be refused before work starts is, here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpa_ext.gram_diagonal import AnyGram
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.sharded import update_of
from hpa_ext.hpa.update import WeightUpdate
from hpa_ext.models.linear import Linear
from hpa_ext.models.remembered import RememberedLinear
from hpa_ext.models.sharding import check_alike, divided_like, is_sharded, local
from hpa_ext.ops._lists import Place, first_overlap

Pair = tuple[Linear | RememberedLinear, Linear]


def distinct(linears: dict[str, Linear]) -> tuple[dict[str, Linear], dict[str, str]]:
    """The first linear of each stored weight, and for the others the name of that first one."""
    first: dict[int, str] = {}
    chosen: dict[str, Linear] = {}
    shared: dict[str, str] = {}
    for name, linear in linears.items():
        linear.refuse_unsupported()
        key = linear.storage_key
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
    old: Mapping[str, Linear | RememberedLinear],
    new: dict[str, Linear],
    safety: Mapping[str, AnyGram],
    task: Mapping[str, AnyGram],
) -> dict[str, Pair]:
    """Old and new linear for each name; raises before any work if something is missing or does not fit."""
    pairs: dict[str, Pair] = {}
    for name, linear in new.items():
        if name not in old:
            raise ValueError(f"{name}: is in model_new but not in model_old")
        before = old[name]
        if isinstance(before, Linear):
            if linear.original is not None and before.module is linear.module:
                before = Linear(name, linear.original)  # the base of an adapted model holds the trained copy too
            before.refuse_unsupported()
            if before.storage_key == linear.storage_key and not linear.has_pending_adapters():
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
            if isinstance(grams, dict):  # one that reads its Grams from a file is asked for them one at a time, later
                check_counted(name, argument, grams[name])
        _check_weights(name, before, linear)
        pairs[name] = (before, linear)
    return pairs


def refuse_overlaps(pairs: Mapping[str, Pair]) -> None:
    """Raise ValueError where writing one weight would write to another one that is covered, too."""
    names = list(pairs)
    places = [Place("model_new", i, local(pairs[name][1].base_weight()), True) for i, name in enumerate(names)]
    places += [
        Place("model_old", i, local(pairs[name][0].base_weight()), False)
        for i, name in enumerate(names)
        if isinstance(pairs[name][0], Linear)
    ]
    found = first_overlap(places, within_layers=False)
    if found is not None:
        new, other = found
        raise ValueError(
            f"{names[new.layer]}: its weight overlaps that of {names[other.layer]} in {other.name}; clone one of them"
        )


def check_counted(name: str, argument: str, gram: AnyGram) -> None:
    """Raise ValueError for a Gram that no batch has reached."""
    if not isinstance(gram, Tensor) and getattr(gram, "token_count", None) == 0:
        raise ValueError(
            f"{name}: its Gram in {argument} has counted no tokens: no batch reached this module; "
            "leave it out with modules="
        )


def _check_weights(name: str, old: Linear | RememberedLinear, new: Linear) -> None:
    """The whole weights fit: shape, dtype and, of sharded ones, how they are divided."""
    after = new.base_weight()
    if isinstance(old, RememberedLinear):
        shape, dtype = old.shape, old.part.dtype
    else:
        before = old.base_weight()
        shape, dtype = before.shape, before.dtype
        if is_sharded(before):  # a plain old weight is cut into parts like the new one's
            check_alike(f"{name}: model_old", before, "model_new", after)
    if tuple(shape) != tuple(after.shape):
        raise ValueError(f"{name}: w_new: expected shape {list(shape)} like w_old, got {list(after.shape)}")
    if dtype != after.dtype:
        raise TypeError(f"{name}: w_new: expected dtype {dtype} like w_old, got {after.dtype}")


def update_of_pair(old: Linear | RememberedLinear, new: Linear) -> WeightUpdate:
    """What the tuning step did to a weight: the factors of a LoRA where it is one, and else both weights."""
    return low_rank_of_pair(old, new) or update_of(*weights(old, new))


def low_rank_of_pair(old: Linear | RememberedLinear, new: Linear) -> LowRankUpdate | None:
    """The one LoRA that is the whole update, on the stored weight of the new model; None where there is no such.

    Its factors are enough, and exact: in 16 bits the difference of the merged weights would be the update with the
    rounding of all weights.
    """
    factors, base = new.pending_lora(), new.base_weight()
    if factors is None or any(is_sharded(tensor) for tensor in (base, *factors[:2])):
        return None
    if isinstance(old, RememberedLinear):
        before = old.weight_like(base)
    elif old.module is new.module:
        before = base  # of the tuned PeftModel itself, whose own update must not count as old
    elif old.has_pending_adapters():
        return None
    else:
        before = old.base_weight()
    if is_sharded(before) or before.dtype != base.dtype:
        return None
    if before is not base and not _same_bits(before.to(base.device), base):
        return None
    a, b, scaling = factors
    return LowRankUpdate(base, a.to(base.device), b.to(base.device), scaling)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether retained elements of either are those of the other: 0 and -0 are not."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.equal(first.view(integers), second.view(integers))


def weights(old: Linear | RememberedLinear, new: Linear) -> tuple[Tensor, Tensor]:
    """Old and new weight ``[out, in]`` on the new one's device and divided as that is."""
    new_weight = new.weight()
    if isinstance(old, RememberedLinear):
        return old.weight_like(new_weight), new_weight
    # With the base of the tuned PeftModel itself as the old model, the wrapper's own update must not count as old.
    old_weight = old.base_weight() if old.module is new.module else old.weight()
    return divided_like(old_weight, new_weight), new_weight
