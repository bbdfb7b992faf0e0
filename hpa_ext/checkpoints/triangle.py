"""The upper triangle of a symmetric matrix, row by row in one vector: half of the bytes of a Gram."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_STRIP_ELEMENTS = 4 << 20


def triangle_length(size: int) -> int:
    """Elements of the upper triangle of ``[size, size]``, diagonal included."""
    return size * (size + 1) // 2


def triangle_strips(matrix: Tensor) -> Iterator[Tensor]:
    """The upper triangle of a square float32 matrix on any device, in consecutive pieces on the CPU, about 16 MB each.

    Row ``i`` contributes its elements ``i`` to the end. A piece is valid until the next one is asked for.
    """
    size = len(matrix)
    for start, stop in _row_ranges(size):
        rows = matrix[start:stop, start:].cpu().numpy()
        piece = torch.empty(triangle_length(size - start) - triangle_length(size - stop), dtype=matrix.dtype)
        flat, position = piece.numpy(), 0
        # A loop over rows of plain copies: index tensors would take 16 bytes for each of the elements.
        for offset in range(stop - start):
            length = size - start - offset
            flat[position : position + length] = rows[offset, offset:]
            position += length
        yield piece


def fill_from_triangle(matrix: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Write a symmetric matrix ``[size, size]`` on the CPU; ``read(start, stop)`` gives elements of its triangle."""
    size = len(matrix)
    position = 0
    for start, stop in _row_ranges(size):
        length = triangle_length(size - start) - triangle_length(size - stop)
        flat, taken = read(position, position + length).numpy(), 0
        rows = matrix[start:stop, start:].numpy()
        for offset in range(stop - start):
            row_length = size - start - offset
            rows[offset, offset:] = flat[taken : taken + row_length]
            taken += row_length
        position += length
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].mT


def _row_ranges(size: int) -> Iterator[tuple[int, int]]:
    rows = max(1, min(512, _STRIP_ELEMENTS // max(size, 1)))
    for start in range(0, size, rows):
        yield start, min(start + rows, size)
