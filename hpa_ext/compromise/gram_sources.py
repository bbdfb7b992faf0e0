"""The Grams that an adapter or a checkpoint is harmonized with, from files or from memory, one input at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import check_full_gram, read_full_grams
from hpa_ext.compromise.solution import Compromise
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram
from hpa_ext.hpa.checkpoint.grams import GramSource, fingerprint_of, leaders, open_grams


@dataclass
class GramSources:
    """Opened Grams by argument: safety, task, and ``earlier[0]`` and so on.

    Attributes:
        mappings: by argument; each gives a `Gram` by module name.
    """

    mappings: dict[str, Mapping[str, Gram]]

    @classmethod
    def open(cls, safety: GramSource, task: GramSource, earlier: Sequence[GramSource]) -> GramSources:
        """Open what is a path. Raises TypeError, ValueError for a task that is in two files of `earlier`, and what
        `GramFile` raises.
        """
        if isinstance(earlier, (str, Mapping)) or not isinstance(earlier, Sequence):
            raise TypeError(f"earlier: expected a sequence of Gram files or mappings, got {type(earlier).__name__}")
        given = {"safety": safety, "task": task} | {f"earlier[{i}]": grams for i, grams in enumerate(earlier)}
        opened = {argument: open_grams(argument, grams) for argument, grams in given.items()}
        refuse_repeated_tasks(grams for argument, grams in opened.items() if argument.startswith("earlier"))
        return cls(opened)

    @property
    def earlier_count(self) -> int:
        """How many Grams of earlier tasks there are for each module."""
        return len(self.mappings) - 2

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse, before any work, Grams that are not there, not whole, empty, or of another width.

        Args:
            widths: in_features by module name.

        Raises:
            TypeError, ValueError: starting with the module's name. Nothing is read from a Gram file for it.
        """
        for argument, grams in self.mappings.items():
            for name, width in widths.items():
                if name not in grams:
                    raise ValueError(f"{name}: no Gram in {argument}; it has {len(grams)} names")
                if isinstance(grams, GramFile):
                    if grams.form != "triangle":
                        raise TypeError(
                            f"{argument}: {grams.path} holds diagonals of inverses (GramDiagonal), and the compromise "
                            'needs whole Grams; calibrate again without reduce="diagonal" (--reduce diagonal)'
                        )
                    found, tokens = grams.in_features(name), grams.token_count(name)
                else:
                    check_full_gram(f"{name}: {argument}", grams[name])
                    if not isinstance(grams[name], Gram):
                        raise TypeError(f"{name}: expected a Gram in {argument}, got a matrix")
                    found, tokens = grams[name].in_features, grams[name].token_count
                if tokens == 0:
                    raise ValueError(
                        f"{name}: its Gram in {argument} has counted no tokens; leave it out with modules="
                    )
                if found != width:
                    raise ValueError(f"{name}: expected a Gram of {width} features in {argument}, got {found}")

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """The names by input: those of a group have the very same Grams. In the order of the first of each."""
        leader_of = [leaders(grams, list(names)) for grams in self.mappings.values()]
        found: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            found.setdefault(tuple(one[name] for one in leader_of), []).append(name)
        return list(found.values())

    def compromise(
        self, name: str, config: CompromiseConfig, device: torch.device, width: int, float64: bool = False
    ) -> Compromise:
        """The solver for a module's input, with its matrices on the device; errors name the module."""
        safety, task, *earlier = (partial(_taken, grams, name) for grams in self.mappings.values())
        try:
            found = read_full_grams((safety, task), width, device, earlier=earlier, float64=float64, move=True)
            return Compromise(found, config)
        except NumericalError as error:
            raise error.in_module(name) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def fingerprints(self, names: Sequence[str]) -> dict[str, str]:
        """Of each source, for the identity of an output."""
        return {argument: fingerprint_of(grams, list(names)) for argument, grams in self.mappings.items()}

    def paths(self) -> list[str]:
        """The files among them."""
        return [str(grams.path) for grams in self.mappings.values() if isinstance(grams, GramFile)]


def refuse_repeated_tasks(sources: Iterable[Mapping[str, Gram]]) -> None:
    """Raise ValueError where a Gram file holds a task that an earlier one holds, for it would count twice."""
    holder: dict[str, str] = {}
    for file in sources:
        if isinstance(file, GramFile):
            for task in _tasks_in({"fingerprint": file.fingerprint(), "provenance": file.provenance}):
                if task in holder:
                    raise ValueError(
                        f"{file.path}: holds a task that is in {holder[task]} already, and would count twice"
                    )
                holder[task] = str(file.path)


def _tasks_in(origin: Mapping[str, Any]) -> set[str]:
    """Fingerprints of the tasks that a file is the sum of, of a single task its own."""
    parts = origin["provenance"].get("sum_of_tasks")
    return set().union(*map(_tasks_in, parts)) if parts else {origin["fingerprint"]}


def _taken(grams: Mapping[str, Gram], name: str) -> Gram:
    """A module's Gram, which a Gram file does not keep for the next module: it would lie beside its matrix."""
    try:
        return grams[name]
    finally:
        if isinstance(grams, GramFile):
            grams.forget()
