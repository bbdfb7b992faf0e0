"""Memory at the highest of each phase, in bytes, beyond the interpreter and torch. Widths are in features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ALLOCATOR = 32 << 20
"""What every run takes beside: strips of a triangle that is read (16 MB), the hash's buffer, and small memory that the
allocator keeps from one phase to the next instead of giving it back."""

_FLOAT32 = 4


def gram(width: int) -> int:
    """A `Gram`'s sum: a float32 square."""
    return _FLOAT32 * width**2


def inverse_diagonal(width: int, *, float64: bool = False) -> int:
    """A Gram and its factor, half a square (csrc/cpu/factorization.h), in float32 or float64."""
    return gram(width) + (8 if float64 else 4) * width * (width + 1) // 2


def inverse_diagonal_of_rows(tokens: int, width: int, itemsize: int) -> int:
    """The kept rows, their Gram ``[tokens, tokens]`` and its factor."""
    return tokens * width * itemsize + _FLOAT32 * tokens**2 * 3 // 2


def pipeline_pool(items: Iterable[Sequence[Sequence[int]]]) -> int:
    """The pool of buffers of a run over weights, when all of them have gone through.

    Args:
        items: what goes through at once, in order; of each its weights, and of each weight the bytes of the tensors
            that are read for it, the last of which becomes the result. While an item is read, the one before it is
            computed with, and the results of the one before that are written.

    A buffer is used again for what fits into it and never becomes larger (hpa_ext/checkpoints/buffers.py), so that a
    model whose tensors grow along the way takes more than several times its largest one. In a run its threads
    decide which buffer is free a moment earlier or later, so that it may take a little more or less.
    """
    free: list[int] = []
    total = 0
    computed: list[list[int]] = []
    written: list[int] = []
    for weights in items:
        taken: list[list[int]] = []
        for sizes in weights:
            taken.append([])
            for size in sizes:
                fitting = [buffer for buffer in free if buffer >= size]
                buffer = min(fitting, default=size)
                if fitting:
                    free.remove(buffer)
                else:
                    total += size
                taken[-1].append(buffer)
        free += written + [buffer for weight in computed for buffer in weight[:-1]]
        written, computed = [weight[-1] for weight in computed], taken
    return total


def low_rank_scratch(rows: int, columns: int, rank: int, *, native: bool) -> int:
    """Of an update ``s B A`` of a weight ``[rows, columns]``: A and B as they are read ahead and computed with, in
    float32 and for the scores in float64; without a native kernel, the weight's rows in float32. They are worked on
    some at a time, but the allocator puts small results between them, so that they can add up to a whole copy.
    """
    factors = (2 * _FLOAT32 + 8) * rank * (rows + columns)
    return factors if native else factors + _FLOAT32 * rows * columns


def compromise(width: int, rows: int, grams: int, *, float64: bool = False) -> int:
    """The Grams of an input while the last of them is read, or their sum with its factor and the solution's rows.

    Args:
        width: of the input.
        rows: the LoRA's rank, or the weight's out_features.
        grams: safety, task and those of earlier tasks, of which the sum alone is kept once it is formed.
        float64: where float32 does not suffice, the sum and its factor are whole squares in float64.

    A Gram that is read lies beside its matrix H, whose values are then looked at, which takes 1 3/4 of it.
    """
    square = gram(width)
    reading = grams * square + square + 7 * square // 4
    held = min(grams, 3)
    row_sets = (grams + (7 if float64 else 5)) * _FLOAT32 * rows * width
    solving = held * square + (4 * square if float64 else 3 * square // 2) + row_sets
    return max(reading, solving)
