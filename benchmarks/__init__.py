"""Microbenchmarks: each operation, and harmonize as a whole, against what others do and against the device's ceilings.

One module for each operation, with ``rows(setting)``: it checks the result against float64, times ours and the peer in
pairs, and yields one `Row` for each metric. ``hpa-ext bench`` is the front end. Installed as ``hpa_ext.benchmarks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

from .rows import Row, Setting

BENCHMARKS = (
    "gram",
    "gram_kernels",
    "inverse_diagonal",
    "column_scores",
    "column_mask",
    "project_merge",
    "routed_lora",
    "low_rank",
    "harmonize",
    "step",
    "compromise",
    "hide",
)


def run(names: Iterable[str], setting: Setting, progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Run the benchmarks of these names, in this order.

    Args:
        names: of `BENCHMARKS`.
        setting: device, sizes, repeats.
        progress: called with a line of text before each benchmark and after each row.

    Returns:
        The rows of all. A row whose result was wrong says so (`Row.correct`); it does not raise.

    Raises:
        ValueError: an unknown name.
    """
    names = list(names)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"unknown benchmark {', '.join(map(repr, unknown))}: expected some of {', '.join(BENCHMARKS)}")
    progress("ceilings of the device")
    setting.measure_ceilings()
    found: list[Row] = []
    for name in names:
        progress(name)
        for row in import_module(f"{__name__}.bench_{name}").rows(setting):
            found.append(row)
            progress(f"{name}: {row.metric}")
    return found


__all__ = ["BENCHMARKS", "Row", "Setting", "run"]
