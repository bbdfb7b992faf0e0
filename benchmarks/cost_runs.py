"""Cost curves of whole runs from disk to disk, against their ``--plan``, and of memory in fresh processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hpa_ext import CompromiseConfig
from hpa_ext.compromise.adapter import harmonize_adapter
from hpa_ext.compromise.estimate import plan_adapter
from hpa_ext.costs import memory as memory_model
from hpa_ext.hpa.checkpoint import harmonize_checkpoint, plan_checkpoint
from hpa_ext.hpa.checkpoint.estimate import CheckpointPlan

from .cost_inputs import Inputs, make_inputs
from .cost_point import Point

_LAYERS = (1, 2, 4, 8)
_WIDTHS = (512, 1024, 2048)
_RANKS = (4, 16, 64, 256)
_NARROW = 512
_RANK = 32
_INVERSE_WIDTHS = (2048, 4096, 8192)


def checkpoint(directory: Path) -> Iterator[Point]:
    """`harmonize_checkpoint` with full Grams: two checkpoints over layers and width, an adapter over its rank."""
    made = make_inputs(directory / "warm", _NARROW, 1, (_RANK,))
    _harmonized(made, made.new, directory / "out")  # loads what is loaded at the first run
    for layers in _LAYERS:
        made = make_inputs(directory / f"layers-{layers}", _NARROW, layers)
        yield _harmonized(made, made.new, directory / "out", f"width {_NARROW}, dense", "layers", layers)
    for width in _WIDTHS:
        made = make_inputs(directory / f"width-{width}", width, 2, _RANKS if width == max(_WIDTHS) else ())
        yield _harmonized(made, made.new, directory / "out", "2 layers, dense", "width", width)
    for rank, path in made.adapters.items():
        yield _harmonized(made, path, directory / "out", f"2 layers, width {max(_WIDTHS)}, adapter", "rank", rank)


def adapter(directory: Path) -> Iterator[Point]:
    """`harmonize_adapter` (the compromise at one strength) over layers, width and rank, and by a budget over layers."""
    fixed, budget = CompromiseConfig(strength=1.0), CompromiseConfig(budget=0.1)
    made = make_inputs(directory / "warm", _NARROW, 1, (_RANK,))
    _compromised(made, _RANK, fixed, directory / "out")
    for layers in _LAYERS:
        made = make_inputs(directory / f"layers-{layers}", _NARROW, layers, (_RANK,))
        for config, kind in ((fixed, "strength"), (budget, "budget")):
            series = f"width {_NARROW}, rank {_RANK}, {kind}"
            yield _compromised(made, _RANK, config, directory / "out", series, "layers", layers)
    for width in _WIDTHS:
        ranks = _RANKS if width == max(_WIDTHS) else ()
        made = make_inputs(directory / f"width-{width}", width, 1, (_RANK, *ranks))
        series = f"1 layer, rank {_RANK}, strength"
        yield _compromised(made, _RANK, fixed, directory / "out", series, "width", width)
    for rank in _RANKS:
        series = f"1 layer, width {max(_WIDTHS)}, strength"
        yield _compromised(made, rank, fixed, directory / "out", series, "rank", rank)


def _harmonized(made: Inputs, new: Path, out: Path, series: str = "", variable: str = "width", value: int = 0) -> Point:
    arguments = {"old": made.old, "new": new, "safety": made.safety, "task": made.task, "out": out}
    plan = plan_checkpoint(**arguments)
    measured = _timed(lambda: harmonize_checkpoint(**arguments, progress=False), out)
    return _point("checkpoint", series, variable, value, measured, plan)


def _compromised(
    made: Inputs,
    rank: int,
    config: CompromiseConfig,
    out: Path,
    series: str = "",
    variable: str = "width",
    value: int = 0,
) -> Point:
    arguments = {"safety": made.safety, "task": made.task, "out": out, "config": config}
    plan = plan_adapter(made.adapters[rank], **arguments)
    measured = _timed(lambda: harmonize_adapter(made.adapters[rank], **arguments, progress=False), out)
    return _point("adapter", series, variable, value, measured, plan)


def _timed(run: Callable[[], Any], out: Path) -> float:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def _point(phase: str, series: str, variable: str, value: int, measured: float, plan: CheckpointPlan) -> Point:
    return Point(phase, series, variable, value, measured, sum(plan.seconds.values()))


_CHILD = """
import json, sys
import torch
arguments = json.loads(sys.argv[1])
torch.set_num_threads(arguments.pop("threads"))
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
if "width" in arguments:
    from hpa_ext import ops
    size = arguments["width"]
    ops.inverse_diagonal(torch.eye(64), 0.01)
    before = status("VmRSS")
    matrix = torch.ones(size, size)
    matrix.diagonal().add_(1)
    ops.inverse_diagonal(matrix, 0.01, assume_symmetric=True)
elif "adapter" in arguments:
    from hpa_ext import CompromiseConfig, harmonize_adapter
    from hpa_ext.compromise.adapter_file import AdapterFile
    AdapterFile(arguments["adapter"]).close()
    before = status("VmRSS")
    harmonize_adapter(**arguments, config=CompromiseConfig(strength=1.0), progress=False)
else:
    from hpa_ext.hpa.checkpoint import harmonize_checkpoint
    from hpa_ext.hpa.checkpoint.job import prepare
    names = ("old", "new", "safety", "task")
    prepare(*(arguments[name] for name in names), None, "checkpoint", [], None).close()
    before = status("VmRSS")
    harmonize_checkpoint(**arguments, progress=False)
print(json.dumps(status("VmHWM") - before))
"""


def memory(directory: Path) -> Iterator[Point]:
    """The most memory of a fresh process beyond what the library takes when its inputs are open."""
    for width in _INVERSE_WIDTHS:
        measured = _peak(width=width)
        yield Point(
            "memory", "inverse diagonal", "width", width, measured, memory_model.inverse_diagonal(width), "bytes"
        )
    for width in _WIDTHS:
        made = make_inputs(directory / f"width-{width}", width, 2, (_RANK,))
        paths = {"safety": made.safety, "task": made.task, "out": directory / "out"}
        runs = {
            "harmonize, dense": {"old": made.old, "new": made.new},
            f"harmonize, rank {_RANK}": {"old": made.old, "new": made.adapters[_RANK]},
            f"compromise, rank {_RANK}": {"adapter": made.adapters[_RANK]},
        }
        for series, own in runs.items():
            plan = (
                plan_adapter(**own, **paths, config=CompromiseConfig(strength=1.0))
                if "adapter" in own
                else plan_checkpoint(**own, **paths)
            )
            measured = _peak(**{name: str(path) for name, path in (own | paths).items()})
            shutil.rmtree(directory / "out")
            yield Point("memory", series, "width", width, measured, plan.memory_bytes, "bytes")


def _peak(**arguments: Any) -> float:
    words = [sys.executable, "-c", _CHILD, json.dumps(arguments | {"threads": torch.get_num_threads()})]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.splitlines()[-1])
