"""Hidden states on disk between two layers: those that enter a layer and those that leave it, a file for each."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import read_exactly, tensor_bytes, write_atomically, write_fully

_PIECE_BYTES = 16 << 20


class Spool:
    """The hidden states ``[batch, tokens, width]`` of all batches, in two files that change roles from layer to layer.

    Args:
        directory: where the files lie; the system's file cache keeps small ones in memory.
        name: what their names start with, one for each process.
        dtype: of the states.

    The states that enter layer ``n`` are written batch by batch between ``begin(n)`` and ``commit(n)``. Meanwhile those
    that enter the layer before it stay, so that a run that is killed can repeat that layer.
    """

    def __init__(self, directory: Path, name: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._paths = [directory / f"{name}-{slot}.bin" for slot in range(2)]
        self._notes = [directory / f"{name}-{slot}.json" for slot in range(2)]
        self._shapes: list[list[tuple[int, ...]]] = [[], []]
        self._descriptors = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) for path in self._paths]

    def available(self) -> list[int]:
        """The layers whose entering states an earlier run has left here, complete and undamaged."""
        found = []
        for slot, note_path in enumerate(self._notes):
            try:
                note = json.loads(note_path.read_text(encoding="utf-8"))
                layer, crc = int(note["layer"]), int(note["crc"])
                self._shapes[slot] = [tuple(map(int, shape)) for shape in note["shapes"]]
                if layer % 2 == slot and note["dtype"] == str(self._dtype) and self._crc(slot) == crc:
                    found.append(layer)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # whatever is wrong with it, the layers before it can be run again
        return found

    def begin(self, layer: int) -> None:
        """The states that enter `layer` come next; they take the place of those of two layers before."""
        slot = layer % 2
        self._notes[slot].unlink(missing_ok=True)
        self._shapes[slot] = []

    def write(self, layer: int, states: Tensor) -> None:
        """Add the states of the next batch.

        Raises:
            ValueError: the layer before has changed their shape or dtype, against those that entered it.
        """
        slot = layer % 2
        offset, position = self._bytes(slot), len(self._shapes[slot])
        expected = tuple(states.shape) if layer == 0 else self._shapes[1 - slot][position]
        if tuple(states.shape) != expected or states.dtype != self._dtype:
            raise ValueError(
                f"mode: layer {layer} turns hidden states {list(expected)} {self._dtype} into {list(states.shape)} "
                f"{states.dtype}; such a model needs mode='whole'"
            )
        contents = tensor_bytes(states.detach().cpu().contiguous())
        write_fully(self._descriptors[slot], contents, offset, self._paths[slot], "hidden states")
        self._shapes[slot].append(tuple(states.shape))

    def commit(self, layer: int) -> None:
        """All states that enter `layer` are written: have them on the disk, for `available` of a later run."""
        slot = layer % 2
        os.fdatasync(self._descriptors[slot])
        note = {
            "layer": layer,
            "dtype": str(self._dtype),
            "crc": self._crc(slot),
            "shapes": self._shapes[slot],
        }
        write_atomically(self._notes[slot], json.dumps(note).encode())

    def read(self, layer: int, batch: int) -> Tensor:
        """The states of a batch that enter `layer`, on the CPU."""
        slot = layer % 2
        states = torch.empty(self._shapes[slot][batch], dtype=self._dtype)
        offset = self._bytes(slot, batch)
        read_exactly(self._descriptors[slot], tensor_bytes(states), offset, self._paths[slot], "hidden states")
        return states

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bytes(self, slot: int, batches: int | None = None) -> int:
        """Bytes of the first so many batches in a file, or of all."""
        return sum(torch.Size(shape).numel() * self._dtype.itemsize for shape in self._shapes[slot][:batches])

    def _crc(self, slot: int) -> int:
        value, position, end = 0, 0, self._bytes(slot)
        piece = memoryview(bytearray(min(_PIECE_BYTES, end)))
        while position < end:
            view = piece[: min(len(piece), end - position)]
            try:
                read_exactly(self._descriptors[slot], view, position, self._paths[slot], "hidden states")
            except CheckpointError:
                return -1  # shorter than it was
            value = zlib.crc32(view, value)
            position += len(view)
        return value
