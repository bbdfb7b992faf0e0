"""The output, cut into pieces of work in the order of its files; pieces that are finished together are a unit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hpa_ext.checkpoints.reader import CheckpointReader, TensorEntry

# A unit ends before it becomes larger than this: the most work that is lost when the process dies.
_UNIT_BYTES = 512 << 20

# Tensors that are only copied travel in pieces of this size.
COPY_BYTES = 32 << 20


@dataclass(frozen=True)
class Piece:
    """Some bytes of one tensor of the output.

    Attributes:
        entry: the tensor, as the input that gives the names holds it.
        kind: "merge" (harmonized), "update" (an adapter changes it, and nothing is harmonized) or "copy".
        module: the linear's canonical name, for "merge".
        offset, nbytes: for "copy", the range of the tensor's bytes; otherwise all of them.
    """

    entry: TensorEntry
    kind: str
    module: str | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """Pieces that are made durable together: a decoder layer's tensors that lie side by side in a file.

    Attributes:
        key: its name in the journal.
        file_name: the file of the output that it is part of.
        label: what the progress bar shows.
    """

    key: str
    file_name: str
    label: str
    pieces: tuple[Piece, ...]

    @property
    def tensors(self) -> list[str]:
        """Names on disk of its tensors, each of which is in no other unit."""
        return list(dict.fromkeys(piece.entry.name for piece in self.pieces))

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return sum(piece.nbytes for piece in self.pieces)


def cut(reader: CheckpointReader, kind_of: Callable[[str], tuple[str, str | None]]) -> list[Unit]:
    """All units of an output with the files of `reader`; ``kind_of(name on disk)`` gives a piece's kind and module."""
    units = []
    for shard in reader.shards:
        gathered: list[Piece] = []
        label = ""
        for entry in shard.entries:
            kind, module = kind_of(entry.name)
            next_label = _layer(entry.name) or "other weights"
            size = sum(piece.nbytes for piece in gathered)
            if gathered and (next_label != label or size + entry.nbytes > _UNIT_BYTES):
                units.append(_unit(shard.file_name, label, gathered))
                gathered = []
            label = next_label
            gathered += _pieces(entry, kind, module)
        if gathered:
            units.append(_unit(shard.file_name, label, gathered))
    return units


def share(units: Iterable[Unit], rank: int, ranks: int) -> list[Unit]:
    """The units of one of several processes, neighbours together, alike in bytes."""
    units = list(units)
    total = sum(unit.nbytes for unit in units)
    chosen, before = [], 0
    for unit in units:
        # The process in whose part the unit's middle lies.
        middle = before + unit.nbytes / 2
        if min(int(middle * ranks / total) if total else 0, ranks - 1) == rank:
            chosen.append(unit)
        before += unit.nbytes
    return chosen


def _pieces(entry: TensorEntry, kind: str, module: str | None) -> Iterator[Piece]:
    if kind != "copy" or entry.nbytes <= COPY_BYTES:
        yield Piece(entry, kind, module, 0, entry.nbytes)
        return
    for offset in range(0, entry.nbytes, COPY_BYTES):
        yield Piece(entry, kind, None, offset, min(COPY_BYTES, entry.nbytes - offset))


def _unit(file_name: str, label: str, pieces: list[Piece]) -> Unit:
    return Unit(f"{file_name}:{pieces[0].entry.name}", file_name, label, tuple(pieces))


def _layer(name: str) -> str | None:
    """The numbered block that a tensor belongs to, such as ``layers.7``."""
    found = re.search(r"(?:^|\.)((?:layers|h|blocks?)\.\d+)\.", name)
    return found.group(1) if found else None
