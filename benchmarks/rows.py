"""What a benchmark is given, and what it yields."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ceilings import Ceilings, copy_probe, measure_ceilings
from .timing import Call, Paired, buffer_sets, measure_pair


@dataclass(frozen=True)
class Check:
    """``||result - exact|| / ||exact||`` against float64, ours and the peer's, and what ours may be at most."""

    error: float
    limit: float
    peer_error: float | None = None

    @property
    def correct(self) -> bool:
        """NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Work:
    """What a call must do at least: `amount` bytes or operations, under the ceiling of this name and rate.

    Attributes:
        amount: bytes read plus bytes written, or multiplications plus additions.
        unit: "B" or "FLOP".
        ceiling: which ceiling, in words; "" for none.
        ceiling_rate: in GB/s or TFLOP/s.
    """

    amount: float
    unit: str
    ceiling: str = ""
    ceiling_rate: float = float("nan")

    @property
    def rate_unit(self) -> str:
        """GB/s for bytes, TFLOP/s for operations."""
        return "GB/s" if self.unit == "B" else "TFLOP/s"

    def rate(self, milliseconds: float) -> float:
        """Achieved, in `rate_unit`."""
        return self.amount / milliseconds / (1e6 if self.unit == "B" else 1e9)


@dataclass(frozen=True)
class Row:
    """One measurement, as it stands in the results file. ``ratio == peer_ms / ours_ms``.

    `details` holds what a benchmark has to say beyond these numbers, as plain values.
    """

    metric: str
    shape: list[int]
    dimensions: str
    dtype: str
    ours_ms: float
    peer: str
    peer_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    ours_quartiles_ms: tuple[float, float]
    repeats: int
    backend: str
    counted: float
    counted_unit: str
    rate: float
    rate_unit: str
    ceiling: str
    share_of_ceiling: float | None
    error: float
    error_limit: float
    peer_error: float | None
    correct: bool
    details: dict[str, Any] | None = None


@dataclass
class Setting:
    """Where and how large to measure.

    Attributes:
        device: of the tensors.
        quick: tiny sizes and few repeats, to see that everything runs. The numbers mean nothing.
        full: also the larger sizes.
        repeats: pairs of each measurement; None leaves it to the time they take.
        seed: of the random data.
        ceilings: of the device, once measured.
        load_average: of the machine before anything was measured; others' work makes times doubtful.
    """

    device: torch.device
    quick: bool = False
    full: bool = False
    repeats: int | None = None
    seed: int = 0
    ceilings: Ceilings | None = None
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])
    _generator: torch.Generator | None = field(default=None, repr=False)

    def measure_ceilings(self) -> Ceilings:
        """Measured once for each setting."""
        if self.ceilings is None:
            self.ceilings = measure_ceilings(self.device, quick=self.quick)
        return self.ceilings

    def cases(self, quick: Sequence, default: Sequence, full: Sequence) -> list:
        """The sizes to measure; `full` ones come after the default ones."""
        return list(quick) if self.quick else [*default, *(full if self.full else ())]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal random numbers on the device, new at every call."""
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self.seed)
        return (torch.randn(shape, generator=self._generator, device=self.device) * scale).to(dtype)

    def sets(self, bytes_per_set: int, make: Callable[[], tuple]) -> list[tuple]:
        """Enough buffer sets to rotate, each from one call of `make`."""
        return [make() for _ in range(buffer_sets(bytes_per_set, self.device))]

    def pair(self, ours: Call, peer: Call) -> Paired:
        """Time both in turns."""
        return measure_pair(ours, peer, self.device, repeats=self.repeats or (3 if self.quick else None))

    def pair_with_copy(self, ours: Call, moved_bytes: int) -> Paired:
        """Time ours against a copy of a large buffer, scaled to the bytes that ours must move."""
        copy, copied_bytes = copy_probe(self.device, quick=self.quick)
        return self.pair(ours, copy).with_peer_scaled(moved_bytes / copied_bytes)

    def traffic(self, moved_bytes: int, *, reads_only: bool = False) -> Work:
        """Bytes, under the device's copy or read bandwidth."""
        ceilings = self.measure_ceilings()
        rate = ceilings.read_gb_s if reads_only else ceilings.copy_gb_s
        return Work(moved_bytes, "B", "read bandwidth" if reads_only else "copy bandwidth", rate)

    def operations(self, amount: float, dtype: torch.dtype) -> Work:
        """Operations, under the device's GEMM for `dtype`."""
        return Work(amount, "FLOP", *self.measure_ceilings().gemm(dtype))


def make_row(
    metric: str, dimensions: str, shape: Sequence[int], dtype: torch.dtype, peer: str,
    paired: Paired, work: Work, check: Check, backend: str,
) -> Row:  # fmt: skip
    """The row of a measurement; `dimensions` names those of `shape`, such as "tokens, in"."""
    rate = work.rate(paired.ours_ms)
    return Row(
        metric=metric,
        shape=list(shape),
        dimensions=dimensions,
        dtype=str(dtype).removeprefix("torch."),
        ours_ms=paired.ours_ms,
        peer=peer,
        peer_ms=paired.peer_ms,
        ratio=paired.ratio,
        ratio_quartiles=paired.ratio_quartiles,
        ours_quartiles_ms=paired.ours_quartiles_ms,
        repeats=paired.repeats,
        backend=backend,
        counted=work.amount,
        counted_unit=work.unit,
        rate=rate,
        rate_unit=work.rate_unit,
        ceiling=work.ceiling,
        share_of_ceiling=rate / work.ceiling_rate if work.ceiling else None,
        error=check.error,
        error_limit=check.limit,
        peer_error=check.peer_error,
        correct=check.correct,
    )


def relative_error(result: Tensor, exact: Tensor) -> float:
    """``||result - exact||_F / ||exact||_F`` in float64."""
    if result.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm())


def rounding_limit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding once to `dtype`, but at least what float32 sums may lose."""
    return max(torch.finfo(dtype).eps / 2, 1e-5)
