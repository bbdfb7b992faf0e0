"""The sum of a Gram, and on the CPU the tokens of its latest small calls, which are added together."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.ops._backend import DTYPE_TAGS, is_traced
from hpa_ext.ops.gram import check_gram

# Each addition to the sum rounds it once: 100,000 tokens one by one cost 3e-5 of it, 64 together 6e-7.
_TOKENS_TOGETHER = 64


class GramSum:
    """``sum x^T x`` ``[in, in]`` float32.

    Args:
        total: the sum so far, taken over without a copy.

    A call of fewer than 64 tokens on the CPU waits as a copy of its rows until 64 are there or the sum is read, so that
    the error does not grow with the number of calls. On a device the tokens that a mask lets through would have to be
    counted on the host: there every call is added at once.
    """

    def __init__(self, total: Tensor) -> None:
        self._total = total
        self._waiting: list[Tensor] = []
        self._waiting_tokens = 0

    @property
    def without_waiting(self) -> Tensor:
        """The sum without the tokens that wait, all of which are finite."""
        return self._total

    @property
    def total(self) -> Tensor:
        """The sum of all tokens, which none waits for then. Not a copy."""
        if self._waiting:
            # Rows of several dtypes become float32, which holds the values of all.
            ops.gram_accumulate_(self._total, torch.cat(self._waiting))
            self._waiting, self._waiting_tokens = [], 0
        return self._total

    def add_(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Add the tokens of x ``[..., in]``, as ``ops.gram_accumulate_`` does, now or with those of later calls."""
        if not self._wait(x, token_mask):
            ops.gram_accumulate_(self._total, x, token_mask)

    def _wait(self, x: Tensor, token_mask: Tensor | None) -> bool:
        if self._total.device.type != "cpu" or is_traced(x, token_mask):
            return False
        check_gram(self._total, x, token_mask)
        tokens = count_tokens(x, token_mask)
        if x.dtype not in DTYPE_TAGS or tokens >= _TOKENS_TOGETHER:
            return False
        if tokens > 0:
            rows = copy_rows(x, token_mask)
            if not squares_stay_finite(rows, 2 * _TOKENS_TOGETHER):
                return False  # the sum then shows it
            self._waiting.append(rows)
            self._waiting_tokens += tokens
            if self._waiting_tokens >= _TOKENS_TOGETHER:
                _ = self.total
        return True


def count_tokens(x: Tensor, token_mask: Tensor | None) -> int:
    """Tokens of x ``[..., in]`` that count. Looks at the mask on the host."""
    return x.numel() // x.shape[-1] if token_mask is None else int(token_mask.sum())


def copy_rows(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """``[tokens, in]`` contiguous: a copy of the tokens of x ``[..., in]`` that count."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows.clone(memory_format=torch.contiguous_format) if token_mask is None else rows[token_mask.flatten()]


def squares_stay_finite(rows: Tensor, tokens: float) -> bool:
    """Whether no sum of so many squares of values like these overflows float32; False for NaN and Inf."""
    largest = float(torch.linalg.vector_norm(rows, torch.inf))
    return largest**2 * tokens < torch.finfo(torch.float32).max
