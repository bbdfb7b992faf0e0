"""Calibration of a whole model on its device, a bounded number of Grams at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from hpa_ext.calibrating.add_up import add_up
from hpa_ext.calibrating.run import CalibrationRun, without_head
from hpa_ext.model_calls import forward_options
from hpa_ext.models.decoder_layers import decoder_layers


def calibrate_whole(run: CalibrationRun, gram_bytes: int) -> None:
    """Load the model, run all batches as often as the Grams' memory asks for, and give each pass's Grams to the store.

    Args:
        run: what to calibrate.
        gram_bytes: memory for Grams, bytes; each pass takes as many layers as fit, at least one.

    A pass whose modules all lie in the decoder's layers ends behind the last of them.
    """
    passes = _passes(run, gram_bytes)
    if not passes:
        return
    model = run.model.module
    inner = _inner_layers(model)
    ends_early = inner is not None and all(name.startswith(f"{inner[0]}.") for names in passes for name in names)
    # The head runs, unless a forward ends before it.
    needed = without_head(model) if ends_early else lambda name: True
    run.processes.together(lambda: run.model.load(needed))
    options = forward_options(model, all_logits=bool(run.head))
    with run.bar(len(passes) * len(run.mine()), "batch") as bar:
        for number, names in enumerate(passes):
            bar.set_description(f"pass {number + 1} of {len(passes)}")
            collector = run.collector(names)
            end = _last_layer(inner, names) if ends_early else None
            run.processes.together(functools.partial(_run_pass, run, collector, end, options, bar))
            run.store.add(f"from {names[0]}", add_up(collector, run.model.device, run.processes))


def _run_pass(run: CalibrationRun, collector: Any, end: nn.Module | None, options: dict[str, Any], bar: Any) -> None:
    with collector.hooked(), _ending_at(end), torch.inference_mode(False), torch.no_grad():
        for number in run.mine():
            keywords, mask = run.inputs(number)
            with collector.listening(mask), suppress(_Enough):
                run.model.module(**keywords, **options)
            bar.update()


def _passes(run: CalibrationRun, gram_bytes: int) -> list[list[str]]:
    """The pending linears, a list for each pass, layers kept together because their linears share inputs."""
    units: dict[str, list[str]] = {}
    inner = _inner_layers(run.model.module)
    for name in run.pending():
        in_layers = inner is not None and name.startswith(f"{inner[0]}.")
        unit = name[len(inner[0]) + 1 :].split(".")[0] if in_layers and inner is not None else name
        units.setdefault(unit, []).append(name)
    passes: list[list[str]] = []
    room = 0
    for names in units.values():
        # Inputs may turn out to be shared; until then each linear counts.
        needed = sum(4 * run.linears[name].base_weight().shape[1] ** 2 for name in names)
        if not passes or needed > room:
            passes.append([])
            room = gram_bytes
        passes[-1] += names
        room -= needed
    return passes


def _inner_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    try:
        return decoder_layers(model)
    except ValueError:
        return None


def _last_layer(inner: tuple[str, nn.ModuleList] | None, names: list[str]) -> nn.Module:
    assert inner is not None
    return inner[1][max(int(name[len(inner[0]) + 1 :].split(".")[0]) for name in names)]


class _Enough(Exception):
    """Ends a forward behind the last layer that is wanted."""


@contextmanager
def _ending_at(module: nn.Module | None) -> Iterator[None]:
    if module is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _Enough

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()
