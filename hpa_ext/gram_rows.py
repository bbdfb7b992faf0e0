"""The rows of a Gram that has seen few tokens: its inverse's diagonal costs less from them than from the Gram."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import ops
from hpa_ext.gram_sum import GramSum, copy_rows, count_tokens, squares_stay_finite
from hpa_ext.ops._backend import DTYPE_TAGS, is_traced

# Of the features. Measured on two cores at 1024 to 4096 features: from the rows it takes 1/29 of accumulating and
# factoring at 0.1, 1/6 at 0.25, half at 0.5 and two thirds at 0.6, for two bytes a value instead of the Gram's four.
_MOST_TOKENS = 0.6
# Smaller Grams are factored in about a millisecond.
_FEWEST_FEATURES = 512


class KeptRows:
    """Copies of the tokens that counted, in the order in which they came, as long as they are few.

    Args:
        in_features: width of the Gram.

    On the CPU only: a device would have to be asked how many tokens a mask lets through.
    """

    def __init__(self, in_features: int) -> None:
        self._in_features = in_features
        self._chunks: list[Tensor] = []
        self._tokens = 0

    @staticmethod
    def serve(in_features: int, device: torch.device) -> bool:
        """Whether rows are worth keeping for a Gram of this size there."""
        return device.type == "cpu" and in_features >= _FEWEST_FEATURES

    def add(self, x: Tensor, token_mask: Tensor | None) -> bool:
        """Keep the tokens of x ``[..., in]``; False, with nothing kept, where they must go into the Gram instead.

        That is: too many, of another dtype than the earlier ones, or not finite in a sum of squares.
        """
        if is_traced(x, token_mask) or x.dtype not in DTYPE_TAGS:
            return False
        if self._chunks and x.dtype != self._chunks[0].dtype:
            return False
        tokens = count_tokens(x, token_mask)
        total = self._tokens + tokens
        if total > _MOST_TOKENS * self._in_features:
            return False
        if tokens > 0:
            rows = copy_rows(x, token_mask)
            if not squares_stay_finite(rows, _MOST_TOKENS * self._in_features):
                return False
            self._chunks.append(rows)
            self._tokens = total
        return True

    def join(self, other: KeptRows) -> bool:
        """Keep another Gram's rows too; False, with nothing done, where they are too many or of another dtype."""
        if self._tokens + other._tokens > _MOST_TOKENS * self._in_features:
            return False
        if len({rows.dtype for rows in (*self._chunks, *other._chunks)}) > 1:
            return False
        self._chunks += other._chunks
        self._tokens += other._tokens
        return True

    def dead_columns(self) -> Tensor:
        """Bool ``[in]``: features whose sum of squares is zero."""
        dead = torch.ones(self._in_features, dtype=torch.bool)
        for rows in self._chunks:
            dead &= torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32) == 0
        return dead

    def inverse_diagonal(self, damping: float) -> ops.InverseDiagonal | None:
        """That of ``ops.inverse_diagonal`` for the sum of x^T x; None where its error bound does not allow it."""
        if self._tokens == 0:
            return None
        found = ops.inverse_diagonal_of_rows(self._joined(), damping)
        if not found.is_accurate:
            return None
        return ops.InverseDiagonal(
            diagonal=found.diagonal,
            damping_used=torch.tensor(damping, dtype=torch.float64),
            precision_bits=torch.tensor(32, dtype=torch.int32),
            failed_minor=torch.tensor(0, dtype=torch.int32),
            from_rows=True,
        )

    def add_to(self, total: GramSum) -> None:
        """Add all tokens to a sum, chunk by chunk: the bits are those of never having kept the rows."""
        for rows in self._chunks:
            total.add_(rows)

    def _joined(self) -> Tensor:
        """All rows as one matrix, of which the chunks become views: no second copy stays."""
        if len(self._chunks) == 1:
            return self._chunks[0]
        sizes = [len(rows) for rows in self._chunks]
        joined = torch.cat(self._chunks)
        self._chunks = list(joined.split(sizes))
        return joined
