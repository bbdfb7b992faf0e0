"""What goes through the pipeline at once: weights that are merged together, or one piece that is not merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from hpa_ext.hpa.checkpoint.pieces import Piece, Unit
from hpa_ext.hpa.groups import batches


@dataclass(frozen=True)
class Bundle:
    """Neighbouring pieces of one unit.

    Attributes:
        pieces: several only if all of them are merged.
    """

    unit: Unit
    pieces: tuple[Piece, ...]

    @property
    def is_merged(self) -> bool:
        """Whether its pieces are weights to harmonize."""
        return self.pieces[0].kind == "merge"

    @property
    def is_last(self) -> bool:
        """Whether the unit is complete with it."""
        return self.pieces[-1] is self.unit.pieces[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return sum(piece.nbytes for piece in self.pieces)


def bundles(units: Iterable[Unit], limit: int | None = None) -> Iterator[Bundle]:
    """The pieces of the units in order; of those that are merged, neighbours of at most `limit` bytes together.

    The limit is that of the largest weight where none is given: a bundle, whose weights lie one behind the other, takes
    no more memory than that weight alone.
    """
    units = list(units)
    if limit is None:
        limit = max((piece.nbytes for unit in units for piece in unit.pieces if piece.kind == "merge"), default=0)
    for unit in units:
        for is_merged, run in groupby(unit.pieces, key=lambda piece: piece.kind == "merge"):
            pieces = list(run)
            sizes = [piece.nbytes for piece in pieces]
            for together in batches(pieces, sizes, limit if is_merged else 0):
                yield Bundle(unit, tuple(together))
