"""The step as a whole: forward of the prompts, Grams, inverse diagonals, harmonize; against the same in eager torch."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hpa_ext
from hpa_ext import ops

from .rows import Check, Row, Setting, Work, make_row
from .step_agreement import DIFFERENCE_LIMIT, Agreement, Result, compare
from .step_clock import PHASES, StepClock, StepTimes
from .step_eager import eager_step
from .step_floors import layer_floors_ms, operations
from .step_model import StepShape, build, memory_plan, needed_bytes, prompts, retune, tuned_copy
from .step_ours import OurStep, our_step
from .timing import Paired, quartiles

QUICK = StepShape(2, 64, 176, 2, safety_samples=2, task_samples=4, tokens=40, batch_samples=2, vocabulary=256)
SMALL = StepShape(2, 512, 1376, 4, safety_samples=2, task_samples=6, tokens=256, batch_samples=2, vocabulary=1000)
ONE_LAYER = StepShape(1, 4096, 11008, 32, safety_samples=4, task_samples=12, tokens=700, batch_samples=4)
WHOLE = StepShape(32, 4096, 11008, 32, 8, 128, tokens=700, batch_samples=8, clip_large=True)
"""LLaVA-1.5-7B with the sets of the paper."""

_LARGE_WIDTH = 2048  # from here on a step is run once, and float64 is no reference but hours
_KEPT_FREE = 0.05  # of the device's memory, for its allocator


def shapes(setting: Setting) -> list[StepShape]:
    """The steps to run: on a CUDA device LLaVA-1.5-7B whole, or as many of its layers as its memory holds."""
    if setting.device.type == "cuda" and not setting.quick:
        _forget(setting.device)
        return [_fitting(WHOLE, torch.cuda.mem_get_info(setting.device)[0])]
    return setting.cases([QUICK], [SMALL], [ONE_LAYER])


def _fitting(shape: StepShape, free_bytes: int) -> StepShape:
    """With as many layers as fit by the plan; the row's shape says how many.

    Raises:
        ValueError: not even one.
    """
    for layers in range(shape.layers, 0, -1):
        fewer = dataclasses.replace(shape, layers=layers)
        if needed_bytes(fewer) <= (1 - _KEPT_FREE) * free_bytes:
            return fewer
    raise ValueError(
        f"step: one layer takes {needed_bytes(dataclasses.replace(shape, layers=1)) / 1e9:.0f} GB of the device's "
        f"memory, of which {free_bytes / 1e9:.0f} GB are free"
    )


def rows(setting: Setting) -> Iterator[Row]:
    """``step_vs_torch_fp32``, and on a CUDA device ``step_vs_torch_tf32``."""
    for shape in shapes(setting):
        yield from _rows(setting, shape)


def precisions(device: torch.device) -> dict[str, tuple[str, str]]:
    """By metric the name of the peer's float32 products, and torch's name for their precision; float32 is first."""
    found = {"step_vs_torch_fp32": ("float32", "highest")}
    if device.type == "cuda":
        found["step_vs_torch_tf32"] = ("TF32", "high")
    return found


@dataclass
class _Side:
    """One way to do the step, and its runs."""

    name: str
    run: Callable[[StepClock], Any]
    times: list[StepTimes] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> StepTimes:
        """The run with the median time; of an even number the faster of the two in the middle."""
        totals = [times.total_ms for times in self.times]
        return self.times[totals.index(statistics.median_low(totals))]


def _rows(setting: Setting, shape: StepShape) -> Iterator[Row]:
    device, config = setting.device, hpa_ext.HPAConfig()
    old = build(shape, device, setting.seed)
    new = tuned_copy(old)
    sets = [prompts(shape, samples, setting.seed + 1 + index) for index, samples in enumerate(shape.samples)]

    def eager(clock: StepClock, precision: str = "highest", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        with _matmul_precision(precision):
            return eager_step(old, new, *sets, config, clock, dtype)

    ours = _Side("ours", lambda clock: our_step(old, new, *sets, config, clock))
    peers = {
        metric: _Side(f"eager torch, {name}", lambda clock, precision=precision: eager(clock, precision))
        for metric, (name, precision) in precisions(device).items()
    }
    _warm_up(setting, shape)

    def run(side: _Side) -> tuple[Any, float]:
        norm = retune(old, new, setting.seed + 3)
        _forget(device)
        clock = StepClock(device, shape.layers)
        found = side.run(clock)
        side.times.append(clock.times())
        side.peak_bytes = max(side.peak_bytes, _peak_bytes(device))
        return found, norm

    is_large = shape.width >= _LARGE_WIDTH
    exact = None
    if not is_large:
        found, _ = run(_Side("float64", lambda clock: eager(clock, dtype=torch.float64)))
        exact = Result.of(new, found)
    agreements: dict[str, tuple[Agreement, Check]] = {}
    for _ in range(setting.repeats or (1 if is_large else 3)):
        step, norm = run(ours)
        mine = Result.of(new, step.retained())
        own_error = compare(exact, new, step.retained(), norm).difference if exact else None
        judged: dict[str, tuple[Agreement, Check]] = {}
        for metric, peer in peers.items():
            retained, norm = run(peer)
            judged[metric] = _judge(new, retained, norm, mine, exact, own_error, judged)
        agreements = {metric: _worse(agreements.get(metric), found) for metric, found in judged.items()}
        del mine
    for metric, peer in peers.items():
        agreement, check = agreements[metric]
        details = _details(setting, shape, step, ours, peer, agreement)
        yield dataclasses.replace(
            make_row(
                metric, "layers, width, inner, task tokens",
                (shape.layers, shape.width, shape.inner, shape.task_samples * shape.tokens), torch.bfloat16, peer.name,
                _paired(ours, peer), Work(operations(shape), "FLOP"), check, _backend(old),
            ),
            details=details,
        )  # fmt: skip


def _judge(
    new: nn.Module, retained: dict[str, Tensor], norm: float, mine: Result, exact: Result | None,
    own_error: float | None, earlier: dict[str, tuple[Agreement, Check]],
) -> tuple[Agreement, Check]:  # fmt: skip
    """Ours against a peer's finished step, and the error that the row states.

    That is the distance from float64 where there is one, else from the float32 peer, which all rows are held to.
    """
    agreement = compare(mine, new, retained, norm)
    if exact is not None:
        return agreement, Check(own_error, DIFFERENCE_LIMIT, compare(exact, new, retained, norm).difference)
    first = next(iter(earlier.values()), (agreement, None))[0]
    return agreement, Check(first.difference, DIFFERENCE_LIMIT, agreement.difference if earlier else None)


def _worse(earlier: tuple[Agreement, Check] | None, found: tuple[Agreement, Check]) -> tuple[Agreement, Check]:
    """Of two runs the one that the row states: a step that is wrong once is wrong. NaN is worse than any number."""
    if earlier is None or math.isnan(found[1].error):
        return found
    return found if found[1].error > earlier[1].error else earlier


def _paired(ours: _Side, peer: _Side) -> Paired:
    mine, theirs = ([times.total_ms for times in side.times] for side in (ours, peer))
    ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
    return Paired(ours.median.total_ms, peer.median.total_ms, quartiles(mine), quartiles(ratios), len(ratios))


def _details(
    setting: Setting, shape: StepShape, step: OurStep, ours: _Side, peer: _Side, agreement: Agreement
) -> dict[str, Any]:
    """What the table and the time line are made of, plain values in milliseconds and bytes."""
    ceilings = setting.measure_ceilings()
    return {
        "step": dataclasses.asdict(shape),
        "words": shape.words(),
        "phases": list(PHASES),
        "ours": dataclasses.asdict(ours.median),
        "peer": dataclasses.asdict(peer.median),
        "floor_layers": layer_floors_ms(shape, step.reduced, ceilings),
        "grams": len(step.reduced),
        "grams_from_rows": sum(one.from_rows for one in step.reduced),
        "agreement": agreement.to_dict(),
        "memory_plan": memory_plan(shape),
        "peak_bytes": {"ours": ours.peak_bytes, "peer": peer.peak_bytes} if setting.device.type == "cuda" else None,
    }


def _backend(model: nn.Module) -> str:
    weight = next(iter(model.parameters()))
    gram = torch.empty(0, device=weight.device)
    pairs = (("gram", weight), ("inverse_diagonal", gram), ("column_scores", weight), ("project_merge", weight))
    served = {ops.backend_of(*pair) for pair in pairs}
    return served.pop() if len(served) == 1 else "mixed"


def _warm_up(setting: Setting, shape: StepShape) -> None:
    """Both sides on tiny weights: libraries are loaded, threads started."""
    tiny = dataclasses.replace(QUICK, clip_large=False)
    if shape == tiny:
        return
    old = build(tiny, setting.device, setting.seed)
    new = tuned_copy(old)
    sets = [prompts(tiny, samples, setting.seed) for samples in tiny.samples]
    for side in (our_step, eager_step):
        retune(old, new, setting.seed)
        side(old, new, *sets, hpa_ext.HPAConfig(), StepClock(setting.device, tiny.layers))


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Within the context: "high" lets float32 products use TF32, "highest" does not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _forget(device: torch.device) -> None:
    """No side finds memory that another one has left behind: each pays for its own allocations."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
