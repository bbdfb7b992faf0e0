"""Paired timing: ours and the peer take turns in one process, so that both meet the same machine."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# A call gets the index of the buffer set to work on.
Call = Callable[[int], object]

_FEWEST_REPEATS = 7
_MOST_REPEATS = 101
_SHORTEST_SAMPLE_S = 2e-4  # shorter calls are timed several at a time on the CPU
_MOST_CALLS = 100
_UNKNOWN_CPU_CACHE = 32 << 20


@dataclass(frozen=True)
class Paired:
    """Medians in milliseconds, and quartiles (25 %, 75 %) of our times and of the paired ratios peer / ours."""

    ours_ms: float
    peer_ms: float
    ours_quartiles_ms: tuple[float, float]
    ratio_quartiles: tuple[float, float]
    repeats: int

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by the medians."""
        return self.peer_ms / self.ours_ms

    def with_peer_scaled(self, factor: float) -> Paired:
        """As if the peer had done `factor` times the work at its rate."""
        low, high = self.ratio_quartiles
        return replace(self, peer_ms=self.peer_ms * factor, ratio_quartiles=(low * factor, high * factor))


def measure_pair(
    ours: Call, peer: Call, device: torch.device, *, repeats: int | None = None, budget_s: float = 3.0
) -> Paired:
    """Time two calls in turns, each going first every other time.

    Args:
        ours: called with an index that grows with every call of either side, to choose among several buffer sets by
            remainder: no call then finds its data in the cache because of the call before.
        peer: likewise.
        device: where they work. On CUDA: events, and a cold L2 cache before each call.
        repeats: pairs to time. None: until `budget_s` seconds are spent, within 7 and 101 pairs.
        budget_s: see `repeats`.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    index = itertools.count()
    calls = [clock.calls_per_sample(call, index) for call in (ours, peer)]
    times: tuple[list[float], list[float]] = ([], [])
    most = repeats or _MOST_REPEATS
    start = time.perf_counter()
    for pair in range(most):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            times[side].append(clock.time_ms((ours, peer)[side], index, calls[side]))
        if repeats is None and pair + 1 >= _FEWEST_REPEATS and time.perf_counter() - start > budget_s:
            break
    ratios = [theirs / mine for mine, theirs in zip(*times, strict=True)]
    return Paired(*map(statistics.median, times), quartiles(times[0]), quartiles(ratios), len(ratios))


def fastest_ms(call: Call, device: torch.device, *, repeats: int = 7) -> float:
    """The shortest time of one call, warmed up, on cold caches on CUDA: for ceilings, which noise must not lower."""
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    index = itertools.count()
    calls = clock.calls_per_sample(call, index)
    return min(clock.time_ms(call, index, calls) for _ in range(repeats))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The 25 % and 75 % quantiles; of a single value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last cache: L2 of a GPU, L3 of a CPU (32 MiB where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return _UNKNOWN_CPU_CACHE


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many buffer sets to rotate so that one has left the cache when its turn comes: 2 to 8."""
    return min(max(2, 1 + math.ceil(1.5 * cache_bytes(device) / max(bytes_per_set, 1))), 8)


class _CpuClock:
    """perf_counter; short calls are timed several at a time."""

    def calls_per_sample(self, call: Call, index: itertools.count) -> int:
        call(next(index))
        call(next(index))
        start = time.perf_counter()
        call(next(index))
        elapsed = time.perf_counter() - start
        return min(max(1, math.ceil(_SHORTEST_SAMPLE_S / max(elapsed, 1e-7))), _MOST_CALLS)

    def time_ms(self, call: Call, index: itertools.count, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(next(index))
        return (time.perf_counter() - start) * 1e3 / calls


class _CudaClock:
    """Events around one call, after reading a buffer four times the L2 cache.

    Reading leaves the cache cold but clean: written lines would have to go to memory during the timed call. It also
    keeps the device busy while the host enqueues the call, so that launch latency does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.rand(cache_bytes(device), dtype=torch.float32, device=device)
        self._sink = torch.empty((), dtype=torch.float32, device=device)
        self._device = device

    def calls_per_sample(self, call: Call, index: itertools.count) -> int:
        for _ in range(5):
            call(next(index))
        torch.cuda.synchronize(self._device)
        return 1

    def time_ms(self, call: Call, index: itertools.count, calls: int) -> float:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.sum(self._flush, dim=0, out=self._sink)
            start.record()
            for _ in range(calls):
                call(next(index))
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / calls
