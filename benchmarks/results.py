"""The results file: written whole or not at all, and never over an earlier one of its own choosing."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .environment import environment, source_root
from .rows import Row, Setting


def contents(rows: Sequence[Row], setting: Setting) -> dict[str, Any]:
    """What the file holds: the environment, the ceilings of the device, and the rows. NaN and Inf become null."""
    return _plain(
        {
            **environment(setting.device),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "quick": setting.quick,
            "seed": setting.seed,
            "load_average": setting.load_average,
            "ceilings": asdict(setting.measure_ceilings()),
            "rows": [asdict(row) for row in rows],
        }
    )


def default_path(device: str) -> Path:
    """``<device>-<date>.json`` under benchmarks/results/ of the checkout, or under ./hpa-ext-benchmarks/.

    A second file of the same day gets the suffix ``-2``, and so on.
    """
    root = source_root()
    folder = Path.cwd() / "hpa-ext-benchmarks" if root is None else root / "benchmarks" / "results"
    stem = f"{sanitised(device)}-{datetime.date.today().isoformat()}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def sanitised(name: str) -> str:
    """Lower case letters, digits and single hyphens: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "unknown"


def save(document: dict[str, Any], path: Path | None = None) -> Path:
    """Write atomically and return where; None takes the default path. Folders are made."""
    path = default_path(document["device"]) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
