"""The strength of each method that has one, as tuning on the tuning seeds chose it (see `tuning` and docs/evidence.md).

A method that is not named here runs with the default of its function.
"""

from __future__ import annotations

from typing import Any

STRENGTHS: dict[str, Any] = {
    "safe-delta": 2.0,
    "safe-delta-authors": 30.0,
    "model-tailor": 0.1,
    "model-tailor-none": 0.3,
    "model-tailor-authors": 0.3,
    "safe-lora": 0.15,
    "task-arithmetic": 0.4,
    "wise-ft": 0.6,
    "ties": 1.0,
    "dare": 0.5,
    "regmean": 10.0,
    "compromise": 10.0,
    "compromise-earlier": 0.1,
    "compromise-budget": 0.1,
    "compromise-budget-earlier": 0.1,
    "ewc": 10000.0,
    "l2p": 10.0,
    "lwf": 1.0,
    "moelora": 2,
    "o-lora": 5.0,
    "sefe": 25000.0,
    "sppft": (2, 3),
}
