"""Many sequences, each kept on disk when it is done: resumable, and shared between processes that run the same ones."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpa_ext.baselines.registry import method

from .sequence import run_sequence
from .settings import ContinualSettings
from .strengths import STRENGTHS

# Raised when a change of the code changes results, so that cached rows of before are not taken.
RESULTS_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One sequence to run: method, seed, condition, order, a strength (None: the tuned one), and further settings
    of the method that are not its own, as pairs.
    """

    method: str
    seed: int
    condition: str
    order: int = 1
    strength: Any = None
    changes: tuple[tuple[str, Any], ...] = ()

    def identity(self, settings: ContinualSettings) -> dict[str, Any]:
        """Everything that decides the result."""
        known = method(self.method)
        options = dict(known.settings)
        if known.strength is not None:
            tuned = STRENGTHS.get(self.method, known.default_strength())
            options[known.strength] = self.strength if self.strength is not None else tuned
        options |= known.checked(dict(self.changes))
        return {
            "version": RESULTS_VERSION,
            "method": self.method,
            "seed": self.seed,
            "condition": self.condition,
            "order": self.order,
            "options": options,
            "regime": settings.to_dict(),
        }

    def digest(self, settings: ContinualSettings) -> str:
        """A name for the identity."""
        text = json.dumps(self.identity(settings), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def path(self, out: Path, settings: ContinualSettings) -> Path:
        """Where the row lies."""
        return _row_path(out, self.condition, self.order, self.method, self.seed, self.digest(settings))


def cells(
    methods: Iterable[str],
    seeds: Iterable[int],
    conditions: Iterable[str],
    orders: Iterable[int],
    changes: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """All combinations, seed by seed, so that what is done first is a whole comparison. Unknown names raise.

    ``changes``: settings of all these methods in place of their own.
    """
    other = tuple(sorted((changes or {}).items()))
    names = [method(name).name for name in methods]
    return [
        Cell(name, seed, condition, order, changes=other)
        for order in orders
        for seed in seeds
        for condition in conditions
        for name in names
    ]


def import_rows(source: Path, out: Path) -> int:
    """Take over rows of an earlier ``results.json`` that `out` lacks; how many.

    They count for the sequences whose identity they were made with, and for no others. ValueError if it is no such
    file.
    """
    rows = json.loads(source.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "digest" in row for row in rows):
        raise ValueError(f"{source}: expected a list of rows with a digest, as in results.json")
    taken = 0
    for row in rows:
        path = _row_path(out, row["condition"], row["order"], row["method"], row["seed"], row["digest"])
        if not path.is_file():
            _write(path, row)
            taken += 1
    return taken


def read_row(path: Path) -> dict[str, Any] | None:
    """A finished row, or None."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def run_cells(
    wanted: Sequence[Cell],
    settings: ContinualSettings,
    out: Path,
    say: Callable[[str], None] = print,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """Run what is not there yet, and return the rows that are, in the order of `wanted`.

    Args:
        wanted: the sequences.
        settings: the regime.
        out: a directory; each row is written there at once, whole or not at all.
        say: called with a line for each sequence.
        deadline: no sequence is begun after this ``time.monotonic()``.

    A sequence that another process is running is left to it; its row is missing from the result unless it is done when
    all others are.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in wanted if not cell.path(out, settings).is_file()]
    say(f"{len(wanted)} sequences, {len(wanted) - len(missing)} of them done before")
    spent: list[float] = []
    for number, cell in enumerate(missing, start=1):
        path = cell.path(out, settings)
        if deadline is not None and time.monotonic() > deadline:
            say(f"stopped at the time limit with {len(missing) - number + 1} sequences to run")
            break
        with _claimed(path) as mine:
            if not mine or path.is_file():
                continue
            began = time.perf_counter()
            row = run_sequence(
                method(cell.method),
                cell.seed,
                cell.condition,
                cell.order,
                settings,
                strength=cell.identity(settings)["options"].get(method(cell.method).strength),
                changes=dict(cell.changes),
                cache=out / "cache",
            )
            _write(path, row | {"digest": cell.digest(settings)})
            spent.append(time.perf_counter() - began)
            left = (len(missing) - number) * sum(spent) / len(spent)
            say(f"[{number}/{len(missing)}] {describe(row)}; about {_duration(left)} to go")
    rows = [read_row(cell.path(out, settings)) for cell in wanted]
    return [row for row in rows if row is not None]


def describe(row: dict[str, Any]) -> str:
    """A row in a line."""
    bwt = "-" if row["BWT"] is None else f"{row['BWT']:.1f}"
    return (
        f"{row['method']} seed {row['seed']} {row['condition']} order {row['order']}: AP {row['AP']:.1f}, BWT {bwt}, "
        f"learning {row['learning']:.1f}, MASR {row['MASR']:.1f}, {row['seconds']:.0f} s"
    )


def write_results(rows: list[dict[str, Any]], out: Path) -> Path:
    """All rows as ``results.json`` in the directory."""
    path = out / "results.json"
    _write(path, rows)
    return path


@contextmanager
def _claimed(path: Path):
    """Whether this process may run the sequence; the claim ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)


def _row_path(out: Path, condition: str, order: int, name: str, seed: int, digest: str) -> Path:
    return out / "rows" / f"{condition}-{order}" / f"{name}-{seed}-{digest}.json"


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
