"""The results as a table for a terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .ceilings import Ceilings
from .rows import Row

_HEADINGS = (
    "metric", "shape", "dtype", "by", "counted", "ours ms", "rate", "of ceiling", "peer", "peer ms", "ratio",
    "25-75 %", "error", "peer error",
)  # fmt: skip
_LEFT = {"metric", "shape", "dtype", "by", "peer", "of ceiling"}
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def header(known: dict[str, Any], ceilings: Ceilings) -> str:
    """Three lines: the device, the versions, the ceilings. `known` is what the results file holds."""
    cuda = f", driver {known['driver']}, CUDA {known['cuda']}" if known["driver"] else ""
    threads = f"{known['threads']} thread{'s' if known['threads'] != 1 else ''}"
    busy = known["load_average"] > 0.5 * (os.cpu_count() or 1)
    load = f"load average before {known['load_average']:.1f}{' (BUSY: times are doubtful)' if busy else ''}"
    return "\n".join(
        (
            f"{known['device']}{cuda}, {threads}, instruction set {known['instruction_set']}, {load}",
            f"hpa_ext {known['hpa_ext']} ({known['compiler'] or 'no native module'}), commit {known['commit']}, "
            f"torch {known['torch']}, Python {known['python']}",
            f"ceilings: copy {ceilings.copy_gb_s:.4g} GB/s (read + written), read {ceilings.read_gb_s:.4g} GB/s, "
            f"GEMM float32 {ceilings.float32_tflop_s:.3g}, bfloat16 {ceilings.bfloat16_tflop_s:.3g} TFLOP/s",
        )
    )


def table(rows: Sequence[Row]) -> str:
    """One line for each row, aligned. ``ratio`` is the peer's time over ours."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if heading in _LEFT else cell.rjust(width)
            for cell, width, heading in zip(line, widths, _HEADINGS, strict=True)
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.ratio_quartiles
    share = "" if row.share_of_ceiling is None else f"{100 * row.share_of_ceiling:.0f} % {row.ceiling}"
    error = f"{row.error:.1e}" if row.correct else f"WRONG {row.error:.1e} > {row.error_limit:.0e}"
    return (
        row.metric,
        "x".join(map(str, row.shape)),
        row.dtype,
        row.backend,
        _with_prefix(row.counted, row.counted_unit),
        _milliseconds(row.ours_ms),
        f"{row.rate:.3g} {row.rate_unit}",
        share,
        row.peer,
        _milliseconds(row.peer_ms),
        f"{row.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        error,
        "" if row.peer_error is None else f"{row.peer_error:.1e}",
    )


def _with_prefix(amount: float, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if amount >= factor:
            return f"{amount / factor:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"


def _milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"
