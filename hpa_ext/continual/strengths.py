"""The strength of each method that has one, as tuning on the tuning seeds chose it (see `tuning` and docs/evidence.md).

A method that is not named here runs with the default of its function.
"""

from __future__ import annotations

from typing import Any

STRENGTHS: dict[str, Any] = {
    "safe-delta": 2.0,
    "model-tailor": 0.1,
    "wise-ft": 0.6,
}
