"""The Grams of several tasks as one, in which each task counts alike whatever its number of tokens.

``H = 2/n sum x^T x`` is a mean over tokens, so that the tasks' matrices are added, and not their sums over tokens as
`Gram.merge_` does for more tokens of one task. The result is a `Gram` whose matrix is ``sum_i H_i`` and whose token
count is that of all tasks together; it takes one matrix however many tasks it holds, can be added to, and stands for
its tasks in ``earlier=[...]``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hpa_ext.checkpoints.files import fsync_path
from hpa_ext.checkpoints.gram_file import GramFile, check_gram_path
from hpa_ext.checkpoints.gram_writer import GramWriter, header_room
from hpa_ext.compromise.gram_sources import GramSources, refuse_repeated_tasks
from hpa_ext.compromise.grams import check_full_gram
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection
from hpa_ext.hpa.checkpoint.grams import leaders


def sum_of_tasks(grams: Sequence[Gram]) -> Gram:
    """The `Gram` whose matrix is the sum of those of `grams`, which are of one input and on one device.

    Raises:
        TypeError, ValueError: no Gram, no whole Gram, other widths or devices, one that has counted no tokens.
        NumericalError: an activation was not finite.
    """
    if not grams:
        raise ValueError("grams: expected at least one Gram")
    for index, gram in enumerate(grams):
        check_full_gram(f"grams[{index}]", gram)
        if not isinstance(gram, Gram):
            raise TypeError(f"grams[{index}]: expected a Gram, got a matrix")
        if (gram.in_features, gram.device) != (grams[0].in_features, grams[0].device):
            raise ValueError(
                f"grams[{index}]: expected {grams[0].in_features} features on {grams[0].device} like the first one, "
                f"got {gram.in_features} on {gram.device}"
            )
    total = grams[0].matrix()
    for gram in grams[1:]:
        total += gram.matrix()
    count = sum(gram.token_count for gram in grams)
    return Gram.of_sum(total.mul_(count / 2), count)


def add_task_(earlier: GramCollection, task: Mapping[str, Gram]) -> GramCollection:
    """Add a task to the sum of earlier ones, in place; to an empty collection the task's own Grams.

    Args:
        earlier: the sum so far. Its Grams are replaced one by one, on the device where they are, not changed.
        task: Grams of the same modules; may share inputs otherwise.

    Raises:
        TypeError, ValueError: other modules or widths, no whole Gram, one that has counted no tokens. Nothing is added.
        NumericalError: an activation was not finite. Nothing is added but to the modules before.
    """
    if not isinstance(earlier, GramCollection):
        raise TypeError(f"earlier: expected a GramCollection, got {type(earlier).__name__}")
    names = list(task)
    width_of = task.in_features if isinstance(task, GramFile) else lambda name: getattr(task[name], "in_features", 0)
    GramSources({"task": task}).check(
        {name: earlier[name].in_features if name in earlier else width_of(name) for name in names}
    )
    if not earlier:
        for name, leader in leaders(task, names).items():
            earlier[name] = task[name] if leader == name else earlier[leader]
        return earlier
    _check_names("task", names, "earlier", list(earlier))
    for group in _groups([earlier, task], list(earlier)):
        earlier.update(dict.fromkeys(group, _sum_of(group[0], [earlier, task])))
    return earlier


def sum_gram_files(files: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> GramFile:
    """Write the sum of the tasks of several Gram files, one Gram at a time.

    Args:
        files: of whole Grams (no ``reduce="diagonal"``) of the same modules; each may hold several tasks already.
        out: the file to make, ending in ``.safetensors``; must not exist.

    Returns:
        The new file, opened; its provenance names the others, with their fingerprints.

    Raises:
        FileExistsError: `out` is there.
        TypeError, ValueError: fewer than two files, diagonals, other modules or widths, a Gram without tokens, a task
            that is in two of them.
        OSError, CheckpointError: a file cannot be read or written.

    The file is complete or not there: it is written under another name, synced and renamed.
    """
    if isinstance(files, (str, os.PathLike)) or len(files) < 2:
        raise ValueError(f"files: expected at least two Gram files, got {files!r}")
    out = check_gram_path(out)
    if out.exists():
        raise FileExistsError(f"{out}: expected a new file; remove it or choose another name")
    opened = [GramFile(path) for path in files]
    partial = out.with_name(out.name + ".writing")
    try:
        names = list(opened[0])
        for file in opened:
            if file.form != "triangle":
                raise TypeError(f"{file.path}: holds diagonals of inverses; expected whole Grams (without --reduce)")
            _check_names(str(file.path), list(file), str(opened[0].path), names)
        refuse_repeated_tasks(opened)
        provenance = {"sum_of_tasks": [_origin(file) for file in opened]}
        with GramWriter(partial, "triangle", header_room(names, provenance)) as writer:
            for group in _groups(opened, names):
                writer.add(group, _sum_of(group[0], opened))
            writer.finish(provenance)
        os.rename(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        for file in opened:
            file.close()
    fsync_path(out.parent)
    return GramFile(out)


def _sum_of(name: str, sources: Sequence[Mapping[str, Gram]]) -> Gram:
    try:
        first = sources[0][name]
        return sum_of_tasks([first, *(on_device(grams[name], first.device) for grams in sources[1:])])
    except NumericalError as error:
        raise error.in_module(name) from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    finally:
        for grams in sources:
            if isinstance(grams, GramFile):
                grams.forget()


def _groups(sources: Sequence[Mapping[str, Gram]], names: list[str]) -> list[list[str]]:
    """The names by input: those of a group share their Gram in every source."""
    leader_of = [leaders(grams, names) for grams in sources]
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        found.setdefault(tuple(one[name] for one in leader_of), []).append(name)
    return list(found.values())


def _check_names(argument: str, names: list[str], other_argument: str, others: list[str]) -> None:
    for first, second, where in ((others, names, argument), (names, others, other_argument)):
        missing = sorted(set(first) - set(second))
        if missing:
            raise ValueError(f"{missing[0]}: no Gram in {where}; expected the same modules in all")


def _origin(file: GramFile) -> dict[str, object]:
    return {"file": Path(file.path).name, "fingerprint": file.fingerprint(), "provenance": file.provenance}


def on_device(gram: Gram, device: torch.device) -> Gram:
    """The Gram itself where it is there already, or is none; else a copy."""
    if not isinstance(gram, Gram) or gram.device == device:
        return gram
    return Gram.of_sum(gram.state_dict()["sum"].to(device), gram.token_count)
