"""Where a step's time goes: spans by phase and decoder layer, each counted without those inside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpa_ext.models.decoder_layers import decoder_layers

PHASES = ("forward", "Gram", "inverse diagonals", "scores", "selection", "merge", "other")
"""`selection` is what HPA does besides scores and merge: alpha, masks, checks, the report. `other` is in no span."""

# Decoder layers, and the share of a span's time that each gets; None stands for outside of the layers.
Shares = Mapping[int | None, float]


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds by phase, in the order of `PHASES`: of each decoder layer, and outside of them. They add up."""

    layers: list[list[float]]
    outside: list[float]
    total_ms: float

    def by_phase(self) -> list[float]:
        """Of all layers and what is outside of them."""
        return [sum(column) for column in zip(*self.layers, self.outside, strict=True)]


@dataclass
class _Span:
    phase: str
    shares: Shares
    parent: _Span | None
    start: Any
    end: Any = None


class StepClock:
    """Marks are taken as the work is enqueued: events on a CUDA device, which needs no waiting, the clock elsewhere.

    Spans nest; the time of an inner one is no part of the outer one's own. What happens inside of `whole` and in no
    span is `other`.
    """

    def __init__(self, device: torch.device, layers: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self.layers, self._now = device, layers, now
        self._spans: list[_Span] = []
        self._current: _Span | None = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The step from its beginning to the end of all its work on the device."""
        if self._spans:
            raise RuntimeError("a StepClock times one step: make a new one for the next")
        self._wait()
        self._open("other", {None: 1.0})
        try:
            yield
        finally:
            self._close()
            self._wait()

    @contextmanager
    def span(self, phase: str, layer: int | Shares | None = None) -> Iterator[None]:
        """Within the context the time belongs to this phase and to this layer, or to several by their shares."""
        self._open(phase, layer if isinstance(layer, Mapping) else {layer: 1.0})
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def decoder_layers(self, model: nn.Module) -> Iterator[None]:
        """Within the context each decoder layer's forward is a span of the phase `forward`."""
        handles = []
        try:
            for index, layer in enumerate(decoder_layers(model)[1]):
                shares = {index: 1.0}
                handles.append(layer.register_forward_pre_hook(lambda *_, shares=shares: self._open("forward", shares)))
                handles.append(layer.register_forward_hook(lambda *_: self._close()))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def layer(self) -> int | None:
        """The decoder layer whose forward is running."""
        return next(iter(self._current.shares)) if self._current is not None else None

    def phases_seen(self) -> set[str]:
        """Phases with at least one span."""
        return {span.phase for span in self._spans[1:]}

    def times(self) -> StepTimes:
        """Once `whole` has ended."""
        layers = [[0.0] * len(PHASES) for _ in range(self.layers)]
        outside = [0.0] * len(PHASES)
        durations = [self._milliseconds(span) for span in self._spans]
        inside = dict.fromkeys(map(id, self._spans), 0.0)
        for span, duration in zip(self._spans, durations, strict=True):
            if span.parent is not None:
                inside[id(span.parent)] += duration
        for span, duration in zip(self._spans, durations, strict=True):
            own = duration - inside[id(span)]
            column, whole = PHASES.index(span.phase), sum(span.shares.values())
            for layer, share in span.shares.items():
                (outside if layer is None else layers[layer])[column] += own * share / whole
        return StepTimes(layers, outside, durations[0])

    def _open(self, phase: str, shares: Shares) -> None:
        span = _Span(phase, shares, self._current, self._mark())
        self._spans.append(span)
        self._current = span

    def _close(self) -> None:
        span = self._current
        span.end = self._mark()
        self._current = span.parent

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _milliseconds(self, span: _Span) -> float:
        if self._device.type != "cuda":
            return (span.end - span.start) * 1e3
        return span.start.elapsed_time(span.end)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
