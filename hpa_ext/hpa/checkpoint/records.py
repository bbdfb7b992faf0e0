"""Layer reports and reduced Grams as JSON, for the journal: a resumed run must go on with the very same values."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.report import LayerReport

MASKS = ("retained", "safety_columns", "task_columns")


def report_record(report: LayerReport) -> dict[str, Any]:
    """The report as JSON values; masks as packed bits."""
    record = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return record | {name: _packed(record[name]) for name in MASKS} | {"columns": len(report.retained)}


def report_of(record: dict[str, Any]) -> LayerReport:
    """The report that `report_record` described."""
    values = {field.name: record[field.name] for field in dataclasses.fields(LayerReport)}
    return LayerReport(**values | {name: _unpacked(record[name], record["columns"]) for name in MASKS})


def manifest_report(
    reports: Iterable[LayerReport], shared: Mapping[str, str], not_covered: Sequence[str]
) -> dict[str, Any]:
    """What a manifest says was done."""
    layers = [report_record(report) | {"retained_count": report.retained_count} for report in reports]
    return {"layers": layers, "shared": dict(shared), "not_covered": list(not_covered)}


def diagonal_record(diagonal: GramDiagonal) -> dict[str, Any]:
    """A reduced Gram as JSON values, bit by bit."""
    return {
        "sum_inverse": base64.b64encode(diagonal.sum_inverse.cpu().numpy().tobytes()).decode(),
        "dead": _packed(diagonal.dead),
        "token_count": diagonal.token_count,
        "damping": diagonal.damping,
        "damping_used": diagonal.damping_used,
        "precision_bits": diagonal.precision_bits,
    }


def diagonal_of(record: dict[str, Any]) -> GramDiagonal:
    """The reduced Gram that `diagonal_record` described, on the CPU."""
    values = np.frombuffer(base64.b64decode(record["sum_inverse"]), dtype=np.float32).copy()
    others = {name: record[name] for name in ("token_count", "damping", "damping_used", "precision_bits")}
    return GramDiagonal(torch.from_numpy(values), _unpacked(record["dead"], len(values)), **others)


def _packed(mask: Tensor) -> str:
    return base64.b64encode(np.packbits(mask.cpu().numpy()).tobytes()).decode()


def _unpacked(text: str, count: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count)
    return torch.from_numpy(bits.astype(bool))
