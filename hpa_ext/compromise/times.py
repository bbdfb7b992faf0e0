"""The time of the compromise's arithmetic on a machine, from the shapes of the linears and short samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.lora_update import LoraUpdate, Step, apply_steps
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.costs import Rates, Work, work
from hpa_ext.costs.samples import (
    Sample,
    cholesky_rates,
    energy_rates,
    filled,
    product_rates,
    shortest_seconds,
    solve_rates,
)
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.samples import dtype_of, gram_read_rate, rank_of

EVALUATIONS = 4
"""Strengths that the search for a budget takes, about: 2 to 6 over random Grams and budgets of 0.02 to 0.2."""

_MOST_SAMPLE_ROWS = 256
_MERGED_ROWS, _MERGED_COLUMNS = 2048, 4096


@dataclass(frozen=True)
class LinearShape:
    """A linear: the width of its input, and the rows of its update (a LoRA's rank, or out_features)."""

    width: int
    rows: int


@dataclass(frozen=True)
class Times:
    """Seconds of the phases, bytes of Grams to read, and rates."""

    seconds: dict[str, float]
    gram_read: int
    rates: dict[str, float]


def solving_times(
    modules: Mapping[str, LinearShape],
    groups: Sequence[Sequence[str]],
    sources: GramSources,
    config: CompromiseConfig,
    device: torch.device,
) -> Times:
    """Reading the Grams, factoring their sums, and solving."""
    if not modules:
        return Times({"read Grams": 0.0, "factor": 0.0, "solve": 0.0}, 0, {})
    count, tried = len(sources.mappings), _tried(config)
    factors = Work()
    solves: dict[int, list[Work]] = {}
    for group in groups:
        for index, name in enumerate(group):
            one = modules[name]
            # At one strength the linears of an input share its factor.
            times = tried if config.strength is None or index == 0 else 0
            factors += times * work.cholesky(one.width, min(count, 3))
            searched = tried if config.strength is None else 0
            # Rows times each Gram, before and after, and at each strength that is tried.
            parts = solves.setdefault(one.rows, [Work(), Work(), Work()])
            parts[0] += tried * work.solve_rows(one.rows, one.width)
            parts[1] += (2 * count + searched) * work.product(one.rows, one.width)
            parts[2] += (2 * count + searched + 2) * work.energy(one.rows, one.width)
    widest = max(one.width for one in modules.values())
    factor_rates = cholesky_rates(widest, min(count, 3), device)
    factoring = factor_rates.seconds(factors)
    solving = 0.0
    for rows, parts in _by_rates(solves):
        kinds = (solve_rates, product_rates, energy_rates)
        rates = [kind(widest, rows, device) for kind in kinds[:2]] + [energy_rates(rows, device)]
        solving += sum(one.seconds(part) for one, part in zip(rates, parts, strict=True))
    found = {"factor": factors.operations / factoring} if factoring else {}
    files = [grams for grams in sources.mappings.values() if isinstance(grams, GramFile)]
    gram_read, reading = 0, 0.0
    if files:
        gram_read = sum(len(files) * work.triangle_bytes(modules[group[0]].width) for group in groups)
        leaders = [group[0] for group in groups]
        found["grams"] = gram_read_rate(files, leaders, device, matrix=True)
        reading = gram_read / found["grams"]
    return Times({"read Grams": reading, "factor": factoring, "solve": solving}, gram_read, found)


def merging_seconds(job: Job, device: torch.device) -> float:
    """The time that it takes to add what was solved for to the weights of a checkpoint."""
    rates: dict[bool, Rates] = {}
    seconds = 0.0
    for name in job.names:
        rank, dtype = rank_of(job, name), dtype_of(job, name)
        if (rank is None) not in rates:
            most = max((rank_of(job, other) or 0 for other in job.names), default=0)
            rates[rank is None] = _merge_rates(most if rank else None, dtype, device)
        shape = job.linears[name].base_weight().shape
        seconds += rates[rank is None].seconds(_merge_work(*shape, rank, dtype.itemsize))
    return seconds


def _merge_work(rows: int, columns: int, rank: int | None, itemsize: int) -> Work:
    if rank is None:
        return work.dense_merge(rows, columns, itemsize)
    return work.low_rank_merge(rows, columns, rank, itemsize)


def _merge_rates(most: int | None, dtype: torch.dtype, device: torch.device) -> Rates:
    """Of adding low-rank updates of ranks up to `most`, or with None dense ones."""

    def measure(rows: int, columns: int, rank: int | None) -> Sample:
        old = filled((rows, columns), dtype).to(device)
        if rank is None:
            new = old.clone()
            seconds = shortest_seconds(lambda: (old.float() + (new.float() - old.float())).to(dtype).cpu())
        else:
            a, b = filled((rank, columns), torch.float32), filled((rows, rank), torch.float32)
            steps = [Step(None, LoraUpdate(a.to(device), b.to(device), 0.01))]
            seconds = shortest_seconds(lambda: (bool(torch.isfinite(old).all()), apply_steps(old, steps).cpu()))
        return _merge_work(rows, columns, rank, dtype.itemsize), seconds

    small, large = (64, 64), (_MERGED_ROWS, _MERGED_COLUMNS)
    ranks = [None] if most is None else dict.fromkeys((max(1, most // 8), most))
    measure(*small, next(iter(ranks)))
    return Rates.fit([measure(*shape, rank) for shape in (small, large) for rank in ranks])


def _by_rates(solves: Mapping[int, list[Work]]) -> list[tuple[int, list[Work]]]:
    """Work by the number of rows that its rates are measured with, at most `_MOST_SAMPLE_ROWS` and two of them."""
    merged: dict[int, list[Work]] = {}
    for rows, parts in sorted(solves.items()):
        measured = min(rows, _MOST_SAMPLE_ROWS)
        near = next((other for other in merged if measured <= 2 * other), measured)
        held = merged.setdefault(near, [Work()] * len(parts))
        merged[near] = [one + more for one, more in zip(held, parts, strict=True)]
    return list(merged.items())


def _tried(config: CompromiseConfig) -> int:
    """Strengths to try for a linear, about."""
    if config.strength is not None:
        return 1
    return EVALUATIONS if 0 < config.budget < 1 else 0
