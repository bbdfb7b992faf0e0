"""The operations in plain torch: the oracle of the tests, and what serves devices and dtypes without a kernel.

Written for clarity, in as many passes as that takes. Everything computes in float32, or in float64 for float64 input,
and runs on any device without synchronising with it. Arguments are taken on trust; hpa_ext.ops checks them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def gram_accumulate_(gram: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
    """``gram [in, in] += x^T x`` for x ``[tokens, in]``; excluded tokens are replaced by zeros, not multiplied."""
    x = x.to(compute_dtype(x))
    if token_mask is not None:
        x = torch.where(token_mask[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    gram += (x.mT @ x).to(gram.dtype)


def inverse_diagonal_attempt(h: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One factorisation in `dtype` of h ``[batch, in, in]``: diagonal, failed_minor and smallest_pivot."""
    batch, size, _ = h.shape
    finite = torch.isfinite(h).flatten(1).all(1)
    identity = torch.eye(size, dtype=dtype, device=h.device)
    a = torch.where(finite[:, None, None], h.to(dtype), identity)
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal + damping * diagonal.mean(-1, keepdim=True)
    # A column without a positive diagonal cannot be scaled; it stays as it is, and its minor fails.
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    a = a * scale[:, :, None] * scale[:, None, :]
    a = a - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed((diagonal > 0).to(dtype))
    factor, info = torch.linalg.cholesky_ex(a)
    inverse_factor = torch.linalg.solve_triangular(factor, identity.expand(batch, -1, -1), upper=False)
    result = inverse_factor.square().sum(-2) * scale.square()
    failed_minor = torch.where(finite, info, torch.full_like(info, -1))
    result = torch.where((failed_minor == 0)[:, None], result, torch.full_like(result, torch.nan))
    smallest_pivot = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return result.to(compute_dtype(h)), failed_minor.to(torch.int32), smallest_pivot.to(torch.float32)


def inverse_diagonal_of_rows(x: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For x ``[tokens, in]``: diagonal, squares, failed_minor, smallest_pivot and smallest_remainder."""
    x = x.to(compute_dtype(x))
    squares = x.square().sum(0)
    delta = damping * squares.mean()
    large = squares > 10 * squares.mean()
    y, first_minor, first_pivot = _whitened(x * ~large @ x.mT, delta, x)
    products = y.mT[large] @ y[:, large]
    one = torch.ones((), dtype=x.dtype, device=x.device)
    joined, second_minor, second_pivot = _whitened(products, one, y.mT[large] @ y)
    inverse, _, _ = _whitened(products, one, torch.eye(products.shape[0], dtype=x.dtype, device=x.device))
    remainder = 1 - y.square().sum(0) + joined.square().sum(0)
    smallest_remainder = torch.where(large, one, remainder).min()
    remainder[large] = inverse.square().sum(0)
    failed_minor = torch.where(torch.isfinite(squares).all(), torch.maximum(first_minor, second_minor), -1)
    failed_minor = torch.where((failed_minor == 0) & (delta <= 0), 1, failed_minor)
    diagonal = torch.where(failed_minor == 0, remainder / delta, torch.nan)
    return diagonal, squares, failed_minor, torch.minimum(first_pivot, second_pivot), smallest_remainder


def _whitened(gram: Tensor, shift: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``L^-1 right`` for ``gram + shift I = L L^T``, factored with unit diagonal; failed minor, smallest pivot."""
    damped = gram + shift * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    scale = damped.diagonal().rsqrt()
    factor, info = torch.linalg.cholesky_ex(damped * scale[:, None] * scale)
    pivots = torch.cat([factor.diagonal().square(), scale.new_ones(1)])
    return torch.linalg.solve_triangular(factor, scale[:, None] * right, upper=False), info, pivots.min()


def column_scores(w_old: Tensor, w_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i D_ij^2 [in]``, ``<D, w_old> []`` and ``||w_old||^2 []`` for ``D = w_new - w_old``."""
    old = w_old.to(compute_dtype(w_old))
    update = w_new.to(old.dtype) - old
    return update.square().sum(0), (update * old).sum(), old.square().sum()


def column_mask(scores: Tensor, counts: Tensor, eligible: Tensor | None = None) -> Tensor:
    """Exactly `counts` ``[...]`` of the highest `scores` ``[..., columns]``, ties to the lower index."""
    # Two stable sorts, the last one deciding: eligible before not, numbers before NaN, high before low, left to right.
    order = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    indices = torch.sort(order, dim=-1, descending=True, stable=True).indices
    group = torch.where(scores.isnan(), 1, 0)
    if eligible is not None:
        group = group.where(eligible, 2)
        counts = torch.minimum(counts, eligible.sum(-1))
    indices = indices.gather(-1, torch.sort(group.gather(-1, indices), dim=-1, stable=True).indices)
    rank = torch.empty_like(indices)
    rank.scatter_(-1, indices, torch.arange(scores.shape[-1], device=scores.device).expand_as(indices))
    return rank < counts[..., None]


def project_merge(w_old: Tensor, w_new: Tensor, mask: Tensor, coefficient: Tensor, axis: str = "input") -> Tensor:
    """``M w_old + (1 - M)(w_new - coefficient w_old)``, M the columns (or, for axis "output", rows) of `mask`."""
    dtype = compute_dtype(w_old)
    adjusted = (w_new.to(dtype) - coefficient.to(dtype) * w_old.to(dtype)).to(w_old.dtype)
    return torch.where(mask[None, :] if axis == "input" else mask[:, None], w_old, adjusted)


def routed_lora(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """``y[s] = sum_c weights[s, c] scaling[c] B_c A_c x[s]`` for x ``[batch, tokens, in]``."""
    dtype = compute_dtype(x)
    shrunk = torch.einsum("bti,cri->btcr", x.to(dtype), a.to(dtype))
    shrunk = shrunk * (weights * scaling).to(dtype)[:, None, :, None]
    return torch.einsum("btcr,cor->bto", shrunk, b.to(dtype)).to(x.dtype)


# Of a weight's rows in float32: small enough to stay in a core's cache, large enough to feed a matrix product.
_ROWS_AT_A_TIME = 512


def _row_blocks(weight: Tensor) -> list[slice]:
    return [slice(start, start + _ROWS_AT_A_TIME) for start in range(0, weight.shape[0], _ROWS_AT_A_TIME)]


def low_rank_scores(w_old: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """`column_scores` for ``D = scaling * b @ a``: ``sum_i D_ij^2 = s^2 diag(A^T (B^T B) A)_j``, ``s <B, W A^T>``."""
    dtype = compute_dtype(w_old)
    # r is small against out and in, so float64 costs little here and no digit is lost in B^T B.
    a_wide, b_wide = a.double(), b.double() * scaling
    # A B with zero rows at the end or a fresh adapter must not give a tiny negative square.
    squared_update = ((b_wide.mT @ b_wide) @ a_wide).mul_(a_wide).sum(0).clamp_(min=0)
    a_columns = a.to(dtype).mT
    inner, norm = [], []
    for rows in _row_blocks(w_old):
        old = w_old[rows].to(dtype)
        # Sums of each row first: their order does not depend on the number of threads.
        inner.append(((old @ a_columns) * b_wide[rows].to(dtype)).sum(1))
        norm.append(torch.linalg.vecdot(old, old))
    empty = torch.zeros(0, dtype=dtype, device=w_old.device)
    sums = [torch.cat([empty, *parts]).double().sum().to(dtype) for parts in (inner, norm)]
    return squared_update.to(dtype), *sums


def low_rank_add(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, gain: Tensor | None, out: Tensor, axis: str = "input"
) -> None:
    """``out = weight * gain + scaling * b @ a``, the gain along the columns (or, for axis "output", the rows)."""
    _low_rank_sum(weight, a, b, scaling, gain, None, out, axis)


def low_rank_merge(
    w_old: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    mask: Tensor,
    coefficient: Tensor,
    out: Tensor,
    axis: str = "input",
) -> None:
    """``out = M w_old + (1 - M)(w_old (1 - coefficient) + scaling * b @ a)``; out may be w_old."""
    one = torch.ones((), dtype=compute_dtype(w_old), device=w_old.device)
    gain = torch.where(mask, one, one - coefficient.to(one.dtype))
    _low_rank_sum(w_old, a, b, scaling, gain, mask, out, axis)


def _low_rank_sum(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gain: Tensor | None,
    keep: Tensor | None,
    out: Tensor,
    axis: str,
) -> None:
    dtype = compute_dtype(weight)
    a, b = a.to(dtype), b.to(dtype)
    for rows in _row_blocks(weight):
        factor, kept = (v if v is None or axis == "input" else v[rows, None] for v in (gain, keep))
        old = weight[rows].to(dtype)
        total = torch.mm(b[rows], a).mul_(scaling).add_(old if factor is None else old * factor).to(weight.dtype)
        out[rows] = total if kept is None else torch.where(kept, weight[rows], total)
