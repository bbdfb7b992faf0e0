"""The step through the public API as one calls it, timed from the outside: calibrate, reduce, harmonize_model."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import hpa_ext
from hpa_ext import ops
from hpa_ext.gram_reduction import reduce_grams

from .step_clock import Shares, StepClock
from .step_model import layer_of, linear_weights

_SETS = ("safety", "task")
_OPERATIONS = {
    "column_scores": "scores",
    "column_scores_list": "scores",
    "project_merge": "merge",
    "project_merge_list": "merge",
}
"""Which phase a call of these belongs to. Their first argument is the old weight, or a list of them."""


@dataclass(frozen=True)
class ReducedGram:
    """A Gram of one decoder layer whose inverse's diagonal was computed, and from what."""

    layer: int
    width: int
    tokens: int
    from_rows: bool


@dataclass
class OurStep:
    """What a run gave: HPA's report, and what was reduced."""

    report: hpa_ext.ModelReport
    reduced: list[ReducedGram] = field(default_factory=list)

    def retained(self) -> dict[str, Tensor]:
        """The retained columns by module name, on the host."""
        return {name: layer.retained for name, layer in self.report.layers.items()}


def our_step(
    old: nn.Module,
    new: nn.Module,
    safety: Sequence[Mapping[str, Tensor]],
    task: Sequence[Mapping[str, Tensor]],
    config: hpa_ext.HPAConfig,
    clock: StepClock,
) -> OurStep:
    """HPA of `new` in place, from prompts to weights; `clock` has then timed it.

    Raises:
        RuntimeError: a phase was never seen, so that its time would stand under another one's name.
    """
    reduced: list[ReducedGram] = []
    with ExitStack() as stack:
        stack.enter_context(_watched(clock, old, new, reduced))
        for model in (old, new):
            stack.enter_context(clock.decoder_layers(model))
        stack.enter_context(clock.whole())
        diagonals = []
        for model, batches in ((old, safety), (new, task)):
            with clock.span("forward"):
                grams = hpa_ext.calibrate(model, batches, progress=False)
            with clock.span("inverse diagonals"):
                diagonals.append(reduce_grams(grams, config.damping, rescue=config.rescue))
        with clock.span("selection"):
            report = hpa_ext.harmonize_model(old, new, *diagonals, config, progress=False)
    missing = {"Gram", "scores", "merge"} - clock.phases_seen()
    if missing:
        raise RuntimeError(f"nothing was timed as {', '.join(sorted(missing))}: the library calls it by another name")
    return OurStep(report, reduced)


@contextmanager
def _watched(clock: StepClock, old: nn.Module, new: nn.Module, reduced: list[ReducedGram]) -> Iterator[None]:
    """Within the context the inner calls of a step are spans of the clock."""
    layer_of_gram: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
    layer_of_weight = {
        weight.data_ptr(): layer_of(name) for model in (old, new) for name, weight in linear_weights(model).items()
    }

    def update(original: Callable, gram: Any, *args: Any, **options: Any) -> Any:
        layer_of_gram.setdefault(gram, clock.layer)
        with clock.span("Gram", clock.layer):
            return original(gram, *args, **options)

    def reduce(original: Callable, gram: Any, damping: float, **options: Any) -> Any:
        layer = layer_of_gram.get(gram)
        with clock.span("inverse diagonals", layer):
            found = original(gram, damping, **options)
        # The report is kept by the Gram, so that asking again computes nothing.
        kept = gram.inverse_diagonal_report(damping, normalization="sum", **options)
        reduced.append(ReducedGram(layer, gram.in_features, gram.token_count, kept.from_rows))
        return found

    def operation(phase: str, original: Callable, w_old: Any, *args: Any, **options: Any) -> Any:
        weights = [w_old] if isinstance(w_old, Tensor) else list(w_old)
        shares: Shares = {}
        for weight in weights:
            layer = layer_of_weight.get(weight.data_ptr())
            shares[layer] = shares.get(layer, 0) + weight.numel()
        with clock.span(phase, shares or None):
            return original(w_old, *args, **options)

    with ExitStack() as stack:
        stack.enter_context(_replaced(hpa_ext.Gram, "update", update))
        stack.enter_context(_replaced(hpa_ext.GramDiagonal, "of", reduce, static=True))
        for name, phase in _OPERATIONS.items():
            if hasattr(ops, name):
                watched = functools.partial(operation, phase, getattr(ops, name))
                for module in _modules_with(name, getattr(ops, name)):
                    stack.enter_context(_set(module, name, watched))
        yield


def _modules_with(name: str, function: Callable) -> list[Any]:
    """Modules of the library that hold this very function under this name, however they imported it."""
    return [
        module
        for key, module in list(sys.modules.items())
        if (key == "hpa_ext" or key.startswith("hpa_ext.")) and vars(module).get(name) is function
    ]


def _replaced(owner: type, name: str, call: Callable, *, static: bool = False) -> Any:
    """Within the context ``owner.name`` is `call`, which gets the original one first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **options: Any) -> Any:
        return call(original, *args, **options)

    return _set(owner, name, staticmethod(watched) if static else watched)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
