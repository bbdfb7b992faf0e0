"""The clock of the step: spans inside spans, layers by shares, everything adds up; events on a CUDA device."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpa_ext.cli import bench

step_clock = importlib.import_module(f"{bench.load_benchmarks().__name__}.step_clock")
PHASES, StepClock = step_clock.PHASES, step_clock.StepClock
CPU = torch.device("cpu")


class Hand:
    """A clock that is set by hand, in seconds."""

    def __init__(self):
        self.seconds = 5.0

    def __call__(self):
        return self.seconds

    def pass_ms(self, milliseconds):
        self.seconds += milliseconds / 1e3


class Decoder(nn.Module):
    """Two layers that take 3 and 4 ms, and 1 ms before them."""

    def __init__(self, hand, inside=lambda: None):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.hand, self.inside = hand, inside

    def forward(self, x):
        self.hand.pass_ms(1)
        for layer in self.layers:
            x = layer(x)
        return x


def by_hand(spans, layers=2):
    """Times of a step in which ``spans(clock, hand)`` happens."""
    hand = Hand()
    clock = StepClock(CPU, layers, now=hand)
    with clock.whole():
        spans(clock, hand)
    return clock, clock.times()


def value(times, phase, layer):
    return (times.outside if layer is None else times.layers[layer])[PHASES.index(phase)]


def test_an_inner_span_is_no_part_of_the_outer_one():
    def spans(clock, hand):
        hand.pass_ms(1)
        with clock.span("forward"):
            hand.pass_ms(10)
            with clock.span("forward", 1):
                hand.pass_ms(3)
                with clock.span("Gram", 1):
                    hand.pass_ms(5)
                hand.pass_ms(4)
            hand.pass_ms(20)
        with clock.span("merge", 0):
            hand.pass_ms(2)

    clock, times = by_hand(spans)
    found = {(phase, layer): value(times, phase, layer) for phase in PHASES for layer in (None, 0, 1)}
    expected = {("other", None): 1, ("forward", None): 30, ("forward", 1): 7, ("Gram", 1): 5, ("merge", 0): 2}
    assert found == pytest.approx({key: expected.get(key, 0) for key in found}, abs=1e-9)
    assert times.total_ms == pytest.approx(45)
    assert sum(times.by_phase()) == pytest.approx(45)
    assert times.by_phase()[PHASES.index("forward")] == pytest.approx(37)
    assert clock.phases_seen() == {"forward", "Gram", "merge"}
    assert clock.times() == times, "asking again changes nothing"


def test_a_call_for_several_layers_is_divided_by_shares():
    def spans(clock, hand):
        with clock.span("scores", {0: 100, 1: 300, None: 100}):
            hand.pass_ms(50)
            with clock.span("scores", 1):
                hand.pass_ms(7)

    times = by_hand(spans)[1]
    assert [value(times, "scores", layer) for layer in (0, 1, None)] == pytest.approx([10, 30 + 7, 10])


def test_decoder_layers_are_spans_of_the_forward():
    hand = Hand()
    clock = StepClock(CPU, 2, now=hand)
    model = Decoder(hand)
    seen = []
    for layer, milliseconds in zip(model.layers, (3, 4), strict=True):
        layer.forward = lambda x, ms=milliseconds: (seen.append(clock.layer), hand.pass_ms(ms), x)[-1]
    with clock.whole():
        with clock.decoder_layers(model), clock.span("forward"):
            model(torch.ones(1))
            model(torch.ones(1))
        model(torch.ones(1))  # outside of the context it is no span
    times = clock.times()
    assert seen == [0, 1, 0, 1, None, None]
    assert [value(times, "forward", layer) for layer in (0, 1, None)] == pytest.approx([6, 8, 2])
    assert value(times, "other", None) == pytest.approx(8)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)


def test_a_clock_times_one_step():
    clock, _ = by_hand(lambda clock, hand: None)
    with pytest.raises(RuntimeError, match="one step"), clock.whole():
        pass


def test_on_a_device_events_are_read_after_all_work_has_ended(monkeypatch):
    """Recorded as the work is enqueued, at the device's time, without waiting in between."""
    device_ms, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self, stream):
            assert stream == "the current stream"
            self.at, self.waits = device_ms[0], len(waited)

        def elapsed_time(self, end):
            assert len(waited) > max(self.waits, end.waits), "read before the device had come there"
            return end.at - self.at

    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(Event=Event, current_stream=lambda device: "the current stream",
                                       synchronize=lambda device: waited.append(device_ms[0])),
    )  # fmt: skip
    clock = StepClock(torch.device("cuda"), 1)
    with clock.whole():
        with clock.span("Gram", 0):
            device_ms[0] += 12
        device_ms[0] += 3
        assert len(waited) == 1, "only before the step"
    assert waited == [0, 15]
    times = clock.times()
    assert (value(times, "Gram", 0), value(times, "other", None), times.total_ms) == (12, 3, 15)
