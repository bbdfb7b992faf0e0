"""gram: ours against the float32 accumulation of the pruning and quantisation codes, and against cuBLAS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .rows import Check, Row, Setting, make_row, relative_error

_TOKENS = 2048
# Tensor cores round towards zero into the accumulator, which costs 1e-5 at 8192 tokens.
_ERROR_LIMIT = 5e-5


def cast_matmul_(h: Tensor, x: Tensor, seen_tokens: int) -> None:
    """A batch as SparseGPT, GPTQ and llm-compressor add it: rescale the mean, cast to float32, full product, add."""
    total = seen_tokens + x.shape[0]
    h *= seen_tokens / total
    x = math.sqrt(2 / total) * x.float()
    h += x.mT @ x


def addmm_(h: Tensor, x: Tensor) -> None:
    """The whole square by one cuBLAS call that accumulates: low precision in, float32 out."""
    torch.addmm(h, x.mT, x, out_dtype=torch.float32, out=h)


def mm_add_(h: Tensor, x: Tensor) -> None:
    """The whole square by cuBLAS, low precision in, float32 out, then added."""
    h += torch.mm(x.mT, x, out_dtype=torch.float32)


def matmul_add_(h: Tensor, x: Tensor) -> None:
    """The whole square for float32 input, accumulated by the GEMM."""
    h.addmm_(x.mT, x)


def cublas_full(h: Tensor, x: Tensor) -> tuple[str, Callable[[Tensor, Tensor], None]] | None:
    """The first of torch's full products that works in this version of torch; None if none does.

    Some versions have no ``out_dtype``, or ignore `h` in it.
    """
    exact = h.double() + x.double().mT @ x.double()
    low = (("addmm(out_dtype=float32)", addmm_), ("mm(out_dtype=float32), add", mm_add_))
    for name, full in low if x.dtype != torch.float32 else (("addmm", matmul_add_),):
        trial = h.clone()
        try:
            full(trial, x)
        except (RuntimeError, TypeError):
            continue
        if relative_error(trial, exact) < _ERROR_LIMIT:
            return name, full
    return None


def sizes(setting: Setting) -> list[tuple[int, int, torch.dtype]]:
    """``(tokens, in, dtype)``. With `setting.full` a range of widths and of tokens, to see how cost grows."""
    bf16, float32 = torch.bfloat16, torch.float32
    grown = [(_TOKENS, size, dtype) for size in (512, 1024) for dtype in (bf16, float32)]
    grown += [(tokens, 2048, bf16) for tokens in (128, 512, 8192)]
    return setting.cases(
        quick=[(96, 64, bf16)],
        default=[(_TOKENS, size, dtype) for size in (2048, 4096) for dtype in (bf16, float32)],
        full=[*grown, (_TOKENS, 11008, bf16)],
    )


def rows(setting: Setting) -> Iterator[Row]:
    """``gram_vs_cast_matmul``, and on CUDA ``gram_vs_cublas_full``."""
    for tokens, size, dtype in sizes(setting):
        yield from _case(setting, tokens, size, dtype)


def _case(setting: Setting, tokens: int, size: int, dtype: torch.dtype) -> Iterator[Row]:
    def make() -> tuple[Tensor, Tensor]:
        start = setting.randn(size, size, scale=tokens**0.5)  # as large as what is added
        return start + start.mT, setting.randn(tokens, size, dtype=dtype)

    sets = setting.sets(size * size * 4 + tokens * size * dtype.itemsize, make)
    gram, x = sets[0]
    product = x.double().mT @ x.double()
    ours_result = ops.gram_accumulate_(gram.clone(), x)
    exact = gram.double() + product
    error = relative_error(ours_result, exact)
    peer_result = gram * (2 / tokens)
    cast_matmul_(peer_result, x, seen_tokens=tokens)
    peer_error = relative_error(peer_result, exact / tokens)
    del product, exact, ours_result, peer_result

    peers: list[tuple[str, str, float | None, Callable[[Tensor, Tensor], None]]] = [
        ("gram_vs_cast_matmul", "cast, full matmul", peer_error, lambda h, x: cast_matmul_(h, x, tokens))
    ]
    full = cublas_full(gram, x) if setting.device.type == "cuda" else None
    if full is not None:
        peers.insert(0, ("gram_vs_cublas_full", full[0], None, full[1]))
    # One triangle of the square, diagonal included.
    work = setting.operations(tokens * size * (size + 1), dtype)
    for metric, name, loss, peer in peers:
        paired = setting.pair(
            lambda index: ops.gram_accumulate_(*sets[index % len(sets)]),
            lambda index, peer=peer: peer(*sets[index % len(sets)]),
        )
        check = Check(error, _ERROR_LIMIT, loss)
        backend = ops.backend_of("gram", x)
        yield make_row(metric, "tokens, in", (tokens, size), dtype, name, paired, work, check, backend)
