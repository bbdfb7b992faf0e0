"""Retained columns of an output against the old model, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.masks import LayerMasks, read_masks
from hpa_ext.checkpoints.progress import ByteProgress
from hpa_ext.checkpoints.reader import CheckpointReader

_BLOCK_BYTES = 64 << 20
"""Of each of the two weights are held at a time."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OldWeights:
    """The weights of the model before a step, by the module that harmonizing named; a context.

    Args:
        path: the model on disk.
        adapters: directories of adapters that belong to it, in order. With any, each weight is formed whole.

    Raises:
        OSError, CheckpointError: a model or an adapter cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]] = ()) -> None:
        self.reader = CheckpointReader(path)
        self.adapters: list[str] = []
        self._weights = None
        if adapters:
            # Names of models are known to transformers alone, which takes seconds to import.
            from hpa_ext.checkpoints.weights import CheckpointWeights

            self._weights = CheckpointWeights(path, list(adapters))
            self.adapters = [adapter.fingerprint() for adapter in self._weights.adapters]
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> OldWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.close()
        if self._weights is not None:
            self._weights.close()

    def shape(self, layer: LayerMasks) -> tuple[int, ...]:
        """The shape of a layer's weight."""
        return self.reader.entry(layer.old_tensor).tensor_shape

    def rows(self, module: str, layer: LayerMasks, start: int, stop: int) -> Tensor:
        """Rows of a layer's weight."""
        if self._weights is None:
            return self.reader.read_rows(layer.old_tensor, start, stop)
        if self._last is None or self._last[0] != module:
            self._last = (module, self._weights.tensor(f"{module}.weight"))
        return self._last[1][start:stop]


def compare_retained(path: str | os.PathLike[str], old: OldWeights, progress: bool = False) -> tuple[list[str], int]:
    """Compare every column that the masks of an output call retained with the old model's.

    A weight of the old model in another dtype is rounded to the output's first, as harmonizing does.

    Returns:
        A line for each tensor that differs, and how many columns are identical.

    Raises:
        OSError, CheckpointError: the output's masks or weights cannot be read.
    """
    masks = read_masks(path)
    problems, identical = [], 0
    with CheckpointReader(path) as new:
        total = sum(new.entries[layer.tensor].nbytes for layer in masks.values() if layer.tensor in new)
        with ByteProgress("comparing", total, progress) as shown:
            for module, layer in masks.items():
                try:
                    differing = _differing(module, layer, new, old, shown)
                except CheckpointError as error:
                    problems.append(f"{module}: {error}")
                    continue
                identical += int(layer.retained.sum()) - differing
                if differing:
                    problems.append(
                        f"{module}: {differing} of {int(layer.retained.sum())} retained columns differ from the old "
                        f"model's in {layer.tensor!r}"
                    )
    return problems, identical


def _differing(module: str, layer: LayerMasks, new: CheckpointReader, old: OldWeights, shown: ByteProgress) -> int:
    """How many retained columns are not bit-identical; reads both weights a block of rows at a time."""
    entry, before = new.entry(layer.tensor), old.shape(layer)
    shape, dimension = entry.tensor_shape, layer.dimension
    if before != shape or not 0 <= dimension < len(shape) or len(layer.retained) != shape[dimension]:
        raise CheckpointError(
            f"expected weights of one shape, and a mask along dimension {dimension}, got {list(shape)} in the output, "
            f"{list(before)} in the old model, and a mask of {len(layer.retained)}"
        )
    differs = torch.zeros(shape[dimension], dtype=torch.bool)
    rows = max(1, _BLOCK_BYTES * shape[0] // max(entry.nbytes, 1))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        ours = new.read_rows(layer.tensor, start, stop)
        theirs = old.rows(module, layer, start, stop).to(entry.dtype)
        unequal = _bits(ours) != _bits(theirs)
        others = [d for d in range(len(shape)) if d != dimension]
        found = unequal.any(dim=others) if others else unequal
        if dimension == 0:
            differs[start:stop] |= found
        else:
            differs |= found
        shown.add(ours.nbytes)
    return int((differs & layer.retained).sum())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])
