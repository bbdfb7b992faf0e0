"""The Grams that a checkpoint is harmonized with: a Gram file, or Grams in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import GramDiagonal

GramSource = str | os.PathLike[str] | Mapping[str, Gram | GramDiagonal]


def open_grams(argument: str, grams: GramSource) -> Mapping[str, Gram | GramDiagonal]:
    """A mapping by module name; a path is opened as a Gram file. Raises TypeError, and what `GramFile` raises."""
    if isinstance(grams, (str, os.PathLike)):
        return GramFile(grams)
    if not isinstance(grams, Mapping):
        raise TypeError(
            f"{argument}: expected the path of a Gram file or a mapping of module names to Grams, "
            f"got {type(grams).__name__}"
        )
    return grams


def check_gram(
    argument: str, name: str, grams: Mapping[str, Gram | GramDiagonal], in_features: int, damping: float
) -> None:
    """Raise unless the mapping has a Gram of that width for the module, and one that takes the damping.

    Nothing is read from a Gram file for it.
    """
    if name not in grams:
        some = f"; it has {len(grams)} names, such as {next(iter(grams))}" if grams else "; it is empty"
        raise ValueError(f"{name}: no Gram in {argument}{some}")
    if isinstance(grams, GramFile):
        width, tokens, reduced_with = grams.in_features(name), grams.token_count(name), grams.damping(name)
    else:
        gram = grams[name]
        if not isinstance(gram, (Gram, GramDiagonal)):
            raise TypeError(f"{name}: expected a Gram or a GramDiagonal in {argument}, got {type(gram).__name__}")
        width, tokens = gram.in_features, gram.token_count
        reduced_with = gram.damping if isinstance(gram, GramDiagonal) else None
    if tokens == 0:
        raise ValueError(
            f"{name}: its Gram in {argument} has counted no tokens: no batch reached this module; "
            "leave it out with modules="
        )
    if width != in_features:
        raise ValueError(f"{name}: expected a Gram of {in_features} features in {argument}, got {width}")
    if reduced_with is not None and reduced_with != damping:
        raise ValueError(
            f"{name}: its Gram in {argument} was reduced to the diagonal of its inverse with damping {reduced_with!r}, "
            f"got damping {damping!r}; reduce it again from the full Gram, or harmonize with the same"
        )


def leaders(grams: Mapping[str, Gram | GramDiagonal], names: list[str]) -> dict[str, str]:
    """For each name the first of `names` that has the very same Gram: what is computed once for all of them."""
    if isinstance(grams, GramFile):
        key_of: dict[str, object] = {name: leader for leader, members in grams.groups.items() for name in members}
    else:
        held = [grams[name] for name in names]  # together: a mapping may make them, and ids of dead ones recur
        key_of = {name: id(gram) for name, gram in zip(names, held, strict=True)}
    first: dict[object, str] = {}
    return {name: first.setdefault(key_of[name], name) for name in names}


def fingerprint_of(grams: Mapping[str, Gram | GramDiagonal], names: list[str]) -> str:
    """Of a Gram file, its own; of Grams in memory, a hash of their numbers and of which module has which."""
    if isinstance(grams, GramFile):
        return grams.fingerprint()
    leader_of = leaders(grams, names)
    digest = hashlib.sha256()
    for name, leader in leader_of.items():
        digest.update(f"{name} {leader}\n".encode())
        if name != leader:
            continue
        gram = grams[name]
        if isinstance(gram, GramDiagonal):
            tensors = [gram.sum_inverse, gram.dead]
            digest.update(f"{gram.token_count} {gram.damping} {gram.damping_used} {gram.precision_bits}\n".encode())
        else:
            tensors = [gram.state_dict()["sum"]]
            digest.update(f"{gram.token_count}\n".encode())
        for tensor in tensors:
            digest.update(memoryview(tensor.cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()
