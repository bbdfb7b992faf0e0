"""inverse_diagonal: ours against the three steps by which GPTQ and SparseGPT reach the inverse, and from few rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row, relative_error

DAMPING = 0.01
_ERROR_LIMIT = 1e-4


def chain(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Cholesky, the inverse from it, and the Cholesky factor of that.

    Returns:
        The diagonal of the inverse, and the upper factor from which those codes go on.
    """
    damped = h.clone()
    diagonal = torch.arange(h.shape[0], device=h.device)
    damped[diagonal, diagonal] += damping * h.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse.diagonal(), torch.linalg.cholesky(inverse, upper=True)


def exact_diagonal(h: Tensor, damping: float) -> Tensor:
    """The same diagonal in float64, from the column norms of the inverse factor."""
    identity = torch.eye(h.shape[0], dtype=torch.float64, device=h.device)
    factor = torch.linalg.cholesky(h.double() + damping * h.double().diagonal().mean() * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False).square().sum(0)


def random_gram(setting: Setting, size: int) -> Tensor:
    """``H = 2/n sum x^T x`` of n = 2 `size` random tokens whose features differ in scale."""
    scale = setting.randn(size, scale=0.5).exp()
    x = setting.randn(2 * size, size) * scale
    return x.mT @ x / size


def rescaled(setting: Setting, h: Tensor) -> Tensor:
    """Another Gram at little cost: the features of h in other units."""
    scale = setting.randn(h.shape[0], scale=0.1).exp()
    return h * scale[:, None] * scale


def sizes(setting: Setting) -> list[int]:
    """Larger by default on a GPU, where the largest layer of a 7B model is affordable too."""
    if setting.device.type == "cuda":
        return setting.cases([64], [4096], [1024, 2048, 11008])
    return setting.cases([64], [2048, 4096], [512, 1024])


def few_tokens(setting: Setting) -> list[tuple[int, int]]:
    """``(tokens, in)`` with fewer tokens than features."""
    return setting.cases(
        [(24, 64)],
        [(512, 2048), (1024, 2048)],
        [(tokens, 2048) for tokens in (128, 256, 768, 1200)] + [(1024, 4096), (2048, 4096)],
    )


def from_the_sum(x: Tensor) -> Tensor:
    """Our own way without the rows: accumulate the Gram, factor it."""
    gram = ops.gram_accumulate_(torch.zeros(x.shape[1], x.shape[1], device=x.device), x)
    return ops.inverse_diagonal(gram, DAMPING, assume_symmetric=True)


def rows(setting: Setting) -> Iterator[Row]:
    """``inverse_diagonal_vs_chain``, and on a CPU ``inverse_diagonal_of_rows_vs_sum``."""
    yield from _of_sums(setting)
    if setting.device.type == "cpu":
        yield from _of_rows(setting)


def _of_rows(setting: Setting) -> Iterator[Row]:
    for tokens, size in few_tokens(setting):

        def make(tokens: int = tokens, size: int = size) -> tuple[Tensor]:
            return (setting.randn(tokens, size, dtype=torch.bfloat16),)

        sets = setting.sets(tokens * size * 2, make)
        (x,) = sets[0]
        exact = exact_diagonal(x.double().mT @ x.double(), DAMPING)
        found = ops.inverse_diagonal_of_rows(x, DAMPING)
        check = Check(
            error=relative_error(found.diagonal, exact) if found.is_accurate else float("nan"),
            limit=_ERROR_LIMIT,
            peer_error=relative_error(from_the_sum(x), exact),
        )
        paired = setting.pair(
            lambda index, sets=sets: ops.inverse_diagonal_of_rows(*sets[index % len(sets)], DAMPING),
            lambda index, sets=sets: from_the_sum(*sets[index % len(sets)]),
        )
        work = setting.operations(2 * tokens**2 * size + tokens**3 / 3, torch.float32)
        yield make_row(
            "inverse_diagonal_of_rows_vs_sum", "tokens, in", (tokens, size), x.dtype, "our gram, inverse_diagonal",
            paired, work, check, ops.backend_of("inverse_diagonal", x),
        )  # fmt: skip


def _of_sums(setting: Setting) -> Iterator[Row]:
    for size in sizes(setting):
        first = random_gram(setting, size)
        sets = setting.sets(size * size * 4, lambda first=first: (rescaled(setting, first),))
        (h,) = sets[0]
        exact = exact_diagonal(h, DAMPING)
        check = Check(
            error=relative_error(ops.inverse_diagonal(h, DAMPING), exact),
            limit=_ERROR_LIMIT,
            peer_error=relative_error(chain(h, DAMPING)[0], exact),
        )
        paired = setting.pair(
            lambda index, sets=sets: ops.inverse_diagonal(*sets[index % len(sets)], DAMPING),
            lambda index, sets=sets: chain(*sets[index % len(sets)], DAMPING),
        )
        yield make_row(
            "inverse_diagonal_vs_chain", "in, in", (size, size), h.dtype, "cholesky, inverse, cholesky",
            paired, setting.operations(2 / 3 * size**3, h.dtype), check, ops.backend_of("inverse_diagonal", h),
        )  # fmt: skip
