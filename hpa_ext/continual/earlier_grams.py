"""What a sequence keeps of the task Grams of its earlier steps, in a form that costs more or less memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpa_ext.gram import GramCollection

FORMS = ("triangle", "low-rank", "diagonal", "last")


class EarlierGrams:
    """The sum of the task Grams of all steps so far, by the first module of each input.

    Each task counts alike, as every ``H = 2/n sum x^T x`` is a mean over tokens.

    Args:
        form: "triangle", the sum as it is, of which one triangle has to be kept; "low-rank", its `rank` leading
            eigenvectors and the diagonal of the rest, again after every step; "diagonal"; "last", the Gram of the step
            before alone.
        rank: of "low-rank".

    ValueError for an unknown form, or a rank below 1.
    """

    def __init__(self, form: str = "triangle", rank: int = 64) -> None:
        if form not in FORMS:
            raise ValueError(f"memory: expected one of {', '.join(FORMS)}, got {form!r}")
        if rank < 1:
            raise ValueError(f"memory_rank: expected at least 1, got {rank}")
        self.form, self.rank, self.steps = form, rank, 0
        self._kept: dict[str, Tensor] = {}

    def add(self, grams: GramCollection) -> None:
        """Add the Grams of a step."""
        for name, gram in grams.distinct().items():
            matrix = gram.matrix()
            if name in self._kept and self.form != "last":
                matrix = matrix + self._kept[name]
            self._kept[name] = reduced(matrix, self.form, self.rank)
        self.steps += 1

    def matrices(self, grams: GramCollection) -> Mapping[str, Tensor]:
        """The sum ``[in, in]`` for every module of `grams`; nothing before the first step."""
        if not self._kept:
            return {}
        first = {id(gram): name for name, gram in grams.distinct().items()}
        return {name: self._kept[first[id(gram)]] for name, gram in grams.items()}

    def nbytes(self) -> int:
        """What the form has to hold, in float32."""
        return sum(4 * values_kept(matrix.shape[0], self.form, self.rank) for matrix in self._kept.values())


def values_kept(width: int, form: str, rank: int) -> int:
    """How many numbers the form holds of a matrix ``[width, width]``."""
    if form == "diagonal":
        return width
    if form == "low-rank":
        return width * (min(rank, width) + 1)
    return width * (width + 1) // 2


def reduced(matrix: Tensor, form: str, rank: int) -> Tensor:
    """What the form keeps of a symmetric matrix, as a matrix; positive semidefinite if `matrix` is."""
    if form == "diagonal":
        return torch.diag(matrix.diagonal())
    if form == "low-rank" and rank < matrix.shape[0]:
        values, vectors = torch.linalg.eigh(matrix.double())
        leading = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
        low = leading @ leading.mT
        return (low + torch.diag((matrix.double() - low).diagonal().clamp_min(0))).to(matrix.dtype)
    return matrix
