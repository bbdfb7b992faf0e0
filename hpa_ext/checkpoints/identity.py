"""What decides the bytes of an output: inputs, settings and versions; and in what two of them differ."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from hpa_ext import _C
from hpa_ext.checkpoints.errors import CheckpointError

FORMAT_VERSION = 1
"""Of journals and manifests."""

_PACKAGES = ("torch", "safetensors", "transformers", "peft")
_MOST_DIFFERENCES = 20
_ABSENT = "(absent)"


def identity(kind: str, inputs: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run.

    Args:
        kind: of the output: "checkpoint", "adapter", "grams" ...
        inputs: the fingerprint of each input by its role, such as ``{"old": "ab12...", "new": ...}``.
        config: settings that change the result.

    Returns:
        Plain values: ``format``, ``kind``, ``inputs``, ``config`` and ``versions``.

    Raises:
        TypeError, ValueError: something in it is no plain value for JSON.
    """
    versions = {"hpa_ext": _C.build_info()["version"], "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    values = {"format": FORMAT_VERSION, "kind": kind, "inputs": inputs, "config": config, "versions": versions}
    return json.loads(json.dumps(values, allow_nan=False))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each key in which two nested mappings differ, with both values."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key}: was {_shown(old, key)}, is {_shown(new, key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in old or key not in new or old[key] != new[key]
    ]


def refuse_difference(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise if the two identities differ; `where` comes first in the message.

    Raises:
        CheckpointError: lists each differing key with both values.
    """
    lines = differences(before, now)
    if lines:
        more = [f"and {len(lines) - _MOST_DIFFERENCES} more"] if len(lines) > _MOST_DIFFERENCES else []
        raise CheckpointError(
            f"{where}: expected what the output was begun with, got {len(lines)} differences:\n  "
            + "\n  ".join(lines[:_MOST_DIFFERENCES] + more)
        )


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else _ABSENT
    return text if len(text) <= 80 else text[:77] + "..."
