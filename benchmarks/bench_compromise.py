"""The compromise: factor and solve against torch's, and one LoRA linear against the same formula in eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.grams import CompromiseGrams
from hpa_ext.compromise.solution import Compromise, UpdateRows
from hpa_ext.ops.cholesky import cholesky

from .bench_inverse_diagonal import random_gram, rescaled, sizes
from .rows import Check, Row, Setting, make_row, relative_error

RANK = 128
STRENGTH = 0.5
_DAMPING = 0.01
_ERROR_LIMIT = 1e-4


def eager(rows: Tensor, h_task: Tensor, h_safety: Tensor, strength: float = STRENGTH) -> Tensor:
    """``A H_t (H_t + mu H_s)^-1`` as one writes it in torch, in the dtype of the Grams."""
    task, safety = (
        h + _DAMPING * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
        for h in (h_task, h_safety)
    )
    factor = torch.linalg.cholesky(task + strength * safety)
    return torch.cholesky_solve((rows.to(h_task.dtype) @ task).mT, factor).mT


def compromise(rows: Tensor, h_task: Tensor, h_safety: Tensor) -> Tensor:
    """The same with what the library reports: the shares that are left, and lost."""
    grams = CompromiseGrams(task=h_task, safety=h_safety, earlier=None, dead_columns={"safety": 0, "task": 0})
    return Compromise(grams, CompromiseConfig(strength=STRENGTH, damping=_DAMPING)).solve(UpdateRows(rows)).rows


def rows(setting: Setting) -> Iterator[Row]:
    """``cholesky_vs_torch`` and ``compromise_vs_eager``."""
    for size in sizes(setting):
        rank = min(RANK, size)
        first = random_gram(setting, size), random_gram(setting, size)
        update = setting.randn(rank, size)

        def make(first: tuple[Tensor, Tensor] = first) -> tuple[Tensor, ...]:
            return tuple(rescaled(setting, h) for h in first)

        sets = setting.sets(2 * size * size * 4, make)
        yield _factor_and_solve(setting, sets, update)

        def ours(index: int, sets: list = sets, update: Tensor = update) -> Tensor:
            return compromise(update, *sets[index % len(sets)])

        def peer(index: int, sets: list = sets, update: Tensor = update) -> Tensor:
            return eager(update, *sets[index % len(sets)])

        exact = eager(update, *(h.double() for h in sets[0]))
        check = Check(relative_error(ours(0), exact), _ERROR_LIMIT, relative_error(peer(0), exact))
        # One factorisation, one product and two substitutions; ours has the products of its report besides.
        work = setting.operations(size**3 / 3 + 6 * rank * size**2, torch.float32)
        backend = cholesky(sets[0][0].clone(), sets[0][0].diagonal().double()).backend
        yield make_row(
            "compromise_vs_eager", "rank, in", (rank, size), torch.float32, "eager torch", setting.pair(ours, peer),
            work, check, backend,
        )  # fmt: skip


def _factor_and_solve(setting: Setting, sets: list[tuple[Tensor, Tensor]], update: Tensor) -> Row:
    rank, size = update.shape
    damped = [h + _DAMPING * h.diagonal().mean() * torch.eye(size, device=h.device) for h, _ in sets]
    diagonals = [h.diagonal().double() for h in damped]

    def ours(index: int) -> Tensor:
        at = index % len(damped)
        return cholesky(damped[at] if native else damped[at].clone(), diagonals[at]).solve_rows(update)

    def peer(index: int) -> Tensor:
        return torch.cholesky_solve(update.mT, torch.linalg.cholesky(damped[index % len(damped)])).mT

    native = cholesky(damped[0].clone(), diagonals[0]).backend == "native"  # which leaves the matrix as it is
    exact = torch.linalg.solve(damped[0].double(), update.double().mT).mT
    check = Check(relative_error(ours(0), exact), _ERROR_LIMIT, relative_error(peer(0), exact))
    return make_row(
        "cholesky_vs_torch", "rank, in", (rank, size), torch.float32, "cholesky, cholesky_solve",
        setting.pair(ours, peer), setting.operations(size**3 / 3 + 4 * rank * size**2, torch.float32), check,
        "native" if native else "torch",
    )  # fmt: skip
