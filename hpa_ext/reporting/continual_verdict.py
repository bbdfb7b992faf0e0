"""What the rows of the continual benchmark say, in sentences that are made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .continual_pairs import Difference, differences
from .continual_tables import Summary, summaries

_KEYS = ("AP", "BWT", "MASR")


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A few sentences on the rows of one condition and order: plain tuning, HPA, who is ahead of HPA, and the front."""
    found = {item.method: item for item in summaries(rows)}
    methods = [item for item in found.values() if item.kind != "bound" and item.values["BWT"] is not None]
    lines = []
    if "seqft" in found and found["seqft"].values["BWT"] is not None:
        plain = {key: found["seqft"].values[key][0] for key in ("AP", "BWT", "MASR", "learning")}
        lines.append(
            f"Plain tuning learns each task to {plain['learning']:.0f} %, ends at {plain['AP']:.0f} % on all of them "
            f"(BWT {plain['BWT']:.0f}), and then answers {plain['MASR']:.0f} % of the harmful prompts."
        )
        if "hpa" in found:
            gains = differences(rows, "hpa", "seqft")
            lines.append("HPA against plain tuning, on the same seeds: " + _listed(gains) + ".")
    if "hpa" in found:
        lines += _against_hpa(rows, [item for item in methods if not item.method.startswith("hpa")])
    if len(methods) > 1:
        names = "; ".join(item.title for item in front(methods))
        lines.append(f"No method has both more AP and a lower MASR than: {names}.")
    return lines


def front(found: Sequence[Summary], key: str = "AP") -> list[Summary]:
    """Those that no other one surpasses in AP (or BWT) and MASR at once, by the means; by rising MASR."""

    def ahead(other: Summary, item: Summary) -> bool:
        more = other.values[key][0] - item.values[key][0]
        safer = item.values["MASR"][0] - other.values["MASR"][0]
        return more >= 0 and safer >= 0 and (more > 0 or safer > 0)

    left = [item for item in found if not any(ahead(other, item) for other in found)]
    return sorted(left, key=lambda item: item.values["MASR"][0])


def _against_hpa(rows: Sequence[dict[str, Any]], others: Sequence[Summary]) -> list[str]:
    surely, likely, behind = [], [], []
    for item in others:
        gains = differences(rows, item.method, "hpa")
        if set(_KEYS) - set(gains):
            continue
        if all(gains[key].is_better for key in _KEYS):
            surely.append(item.title)
        elif all(gains[key].direction * gains[key].mean > 0 for key in _KEYS):
            likely.append(item.title)
        elif all(gains[key].direction * gains[key].mean < 0 for key in _KEYS):
            behind.append(item.title)
    lines = []
    for label, names in (
        ("Ahead of HPA in AP, BWT and MASR at once, outside the intervals", surely),
        ("Ahead of it in all three by the means", likely),
        ("Behind it in all three by the means", behind),
    ):
        lines.append(f"{label}: {'; '.join(names) if names else 'none'}.")
    return lines


def _listed(gains: dict[str, Difference]) -> str:
    def sure(gain: Difference) -> str:
        return " (better)" if gain.is_better else " (worse)" if gain.is_worse else " (not decided)"

    return ", ".join(f"{key} {gain}{sure(gain)}" for key, gain in gains.items())
