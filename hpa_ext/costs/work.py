"""What each phase does, counted: calls, bytes of main memory, and floating-point operations.

A multiplication and an addition are two operations. Bytes are those that a perfect cache would have to move: every
operand once. Terms of lower order (scaling, column norms, masks) are left out of the operations; they travel with the
bytes. Widths are in features, `rows` and `columns` are those of a weight ``[out, in]``, `itemsize` is in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOAT32 = 4


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        calls: how often it is begun, each time with the same overhead.
        bytes: read from and written to memory.
        operations: floating-point operations, a multiplication and an addition being two.
    """

    calls: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.calls + other.calls, self.bytes + other.bytes, self.operations + other.operations)

    def __radd__(self, other: int) -> Work:
        return self if other == 0 else NotImplemented  # the start of sum()

    def __mul__(self, count: float) -> Work:
        return Work(self.calls * count, self.bytes * count, self.operations * count)

    __rmul__ = __mul__


def forward(parameters: int, tokens: int, itemsize: int) -> Work:
    """A model's forward over `tokens`: two operations per parameter and token; the weights are read once.

    Attention's ``4 tokens context width`` a layer is left out: 4 % of the whole at 7B and a context of 700 tokens.
    Source: Kaplan et al. 2020, section 2.1.
    """
    return Work(1, parameters * itemsize, 2.0 * parameters * tokens)


def gram_accumulation(tokens: int, width: int, itemsize: int) -> Work:
    """``S += X^T X`` with X ``[tokens, width]``: one triangle with its diagonal, and S read and written in float32.

    Linears that share an input share its Gram (q, k and v; gate and up): call this once for them.
    """
    return Work(
        1, tokens * width * itemsize + 2 * _FLOAT32 * width**2, float(tokens) * width * (width + 1)
    )  # fmt: skip


def inverse_diagonal(width: int) -> Work:
    """``diag(H^-1)`` of a matrix ``[width, width]``: a Cholesky factorisation and the columns of the factor's inverse.

    ``(d^3 - d) / 3`` operations each, so 2/3 d^3; the triangle read, and the factor written and read.
    """
    return Work(1, _inverse_bytes(width), 2.0 * (width**3 - width) / 3)


def inverse_diagonal_of_rows(tokens: int, width: int, itemsize: int) -> Work:
    """The same from the rows X ``[tokens, width]`` (Woodbury): no Gram is formed.

    ``G = X X^T`` (one triangle, ``t (t + 1) d``), its factor ``(t^3 - t) / 3``, and ``L^-1 X`` (``t (t - 1) d``).
    """
    operations = 2.0 * tokens**2 * width + (tokens**3 - tokens) / 3
    return Work(1, tokens * width * (itemsize + 2 * _FLOAT32) + 2 * _FLOAT32 * tokens**2, operations)


def _inverse_bytes(width: int) -> float:
    return _FLOAT32 * width**2 * (1 / 2 + 2 * 1 / 2)


def dense_scores(rows: int, columns: int, itemsize: int) -> Work:
    """``column_scores``: the old and the new weight are read once."""
    return Work(1, 2.0 * rows * columns * itemsize, 0.0)


def dense_merge(rows: int, columns: int, itemsize: int) -> Work:
    """``project_merge``: two weights are read, one is written."""
    return Work(1, 3.0 * rows * columns * itemsize, 0.0)


def low_rank_scores(rows: int, columns: int, rank: int, itemsize: int) -> Work:
    """The scores of an update ``s B A``: the old weight is read once.

    ``W A^T`` (``2 out in r`` operations), ``B^T B`` (``2 out r^2``) and its product with A (``2 in r^2``), as the
    reference does it. The native kernels form ``B A`` tile by tile, ``2 out in r``; rates are fitted to what serves.
    """
    operations = 2.0 * rows * columns * rank + 2.0 * rank**2 * (rows + columns)
    return Work(1, float(rows * columns * itemsize), operations)


def low_rank_merge(rows: int, columns: int, rank: int, itemsize: int) -> Work:
    """The merge of an update ``s B A``: the product (``2 out in r`` operations), one weight read and one written."""
    return Work(1, 2.0 * rows * columns * itemsize, 2.0 * rows * columns * rank)


def cholesky(width: int, summed: int = 0) -> Work:
    """The factor of a matrix ``[width, width]``: ``(d^3 - d) / 3`` operations.

    Args:
        summed: of how many float32 matrices the matrix is the sum that is formed first.
    """
    matrix = _FLOAT32 * width**2
    return Work(1, matrix * (summed + (summed > 0) + 1.0), (width**3 - width) / 3)


def solve_rows(count: int, width: int) -> Work:
    """``count`` rows times the inverse, by the factor: two triangular solves of ``count d (d - 1)`` operations each."""
    return Work(1, _FLOAT32 * (2 * width**2 / 2 + 2.0 * count * width), 2.0 * count * width * (width - 1))


def product(count: int, width: int) -> Work:
    """``[count, width]`` times ``[width, width]`` in float32."""
    return Work(1, _FLOAT32 * (width**2 + 2.0 * count * width), 2.0 * count * width**2)


def energy(count: int, width: int) -> Work:
    """``tr(M X Y^T)`` of X, Y ``[count, width]``: ``X Y^T`` in float64, of copies."""
    return Work(1, 2.0 * count * width * (_FLOAT32 + 8), 2.0 * count**2 * width)


def triangle_bytes(width: int) -> int:
    """A Gram on disk: one triangle with its diagonal, float32."""
    return 2 * width * (width + 1)
