"""harmonize as a whole: HPA on one layer, from weights and Grams to the merged weight, against eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import hpa_ext
from hpa_ext import ops

from .bench_column_scores import weight_pair
from .bench_inverse_diagonal import random_gram, rescaled, sizes
from .rows import Check, Row, Setting, make_row, relative_error, rounding_limit

_DEPTH = 0.5


def eager(
    w_old: Tensor, w_new: Tensor, h_safety: Tensor, h_task: Tensor, depth: float, config: hpa_ext.HPAConfig
) -> Tensor:
    """Algorithm 1 of HPA for one layer as one writes it in torch: float32, or float64 for float64 weights."""
    dtype = torch.float64 if w_old.dtype == torch.float64 else torch.float32
    old = w_old.to(dtype)
    update = w_new.to(dtype) - old
    safety, task = ((update**2 / _inverse_diagonal(h.to(dtype), config.damping)).mean(0) for h in (h_safety, h_task))
    valid = (safety > 0) & (task > 0)
    middle, half = (config.alpha_min + config.alpha_max) / 2, (config.alpha_max - config.alpha_min) / 2
    alpha = middle + half * torch.tanh((safety[valid] / task[valid]).log().mean())
    columns, percent = old.shape[1], config.retain_percent(depth)
    retain = int(percent * columns / 100 + 0.5)
    focus = min(int(percent * config.focus_multiple * columns / 100 + 0.5), columns)
    everything = torch.ones_like(valid)
    safety_columns, task_columns = _top(safety, focus, everything), _top(task, focus, everything)
    retained = _top(safety, retain, safety_columns & ~task_columns)
    rest = retain - int(retained.sum())
    retained = retained | _top(safety - alpha * task, rest, safety_columns & task_columns)
    coefficient = (update * old).sum() / (old**2).sum()
    adjusted = (old + update - coefficient * old).to(w_old.dtype)
    return torch.where(retained, w_old, adjusted)


def _inverse_diagonal(h: Tensor, damping: float) -> Tensor:
    damped = h + damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()


def _top(scores: Tensor, count: int, eligible: Tensor) -> Tensor:
    count = min(count, int(eligible.sum()))
    chosen = scores.masked_fill(~eligible, -torch.inf).topk(count).indices
    return torch.zeros_like(eligible).index_fill_(0, chosen, True)


def rows(setting: Setting) -> Iterator[Row]:
    """``harmonize_vs_eager``: a square bfloat16 layer."""
    config, dtype = hpa_ext.HPAConfig(), torch.bfloat16
    for size in sizes(setting):
        first = (random_gram(setting, size), random_gram(setting, size))

        def make(size: int = size, first: tuple[Tensor, Tensor] = first) -> tuple[Tensor, ...]:
            return (*weight_pair(setting, size, size, dtype), *(rescaled(setting, h) for h in first))

        sets = setting.sets(2 * size * size * (4 + dtype.itemsize), make)

        def ours(index: int, sets: list = sets) -> Tensor:
            old, new, *grams = sets[index % len(sets)]
            return hpa_ext.harmonize(old, new, tuple(grams), _DEPTH, config)

        def peer(index: int, sets: list = sets) -> Tensor:
            return eager(*sets[index % len(sets)], _DEPTH, config)

        exact = eager(*(value.double() for value in sets[0]), _DEPTH, config)
        check = Check(relative_error(ours(0), exact), rounding_limit(dtype), relative_error(peer(0), exact))
        # The two factorisations; everything else is traffic.
        work = setting.operations(4 / 3 * size**3, torch.float32)
        old, h = sets[0][0], sets[0][2]
        served = {ops.backend_of(*pair) for pair in (("inverse_diagonal", h), ("project_merge", old))}
        backend = served.pop() if len(served) == 1 else "mixed"
        yield make_row(
            "harmonize_vs_eager", "out, in", (size, size), dtype, "eager torch", setting.pair(ours, peer), work, check,
            backend,
        )  # fmt: skip
