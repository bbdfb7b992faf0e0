"""One journal for each process of a run; between runs, one for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.output import begin_output, partial_directory
from hpa_ext.processes import Processes


@contextmanager
def own_journal(
    out: Path, identity: dict, resume: bool, inputs: Sequence[str | os.PathLike[str]], processes: Processes
) -> Iterator[Journal]:
    """The journal of this process, locked; rank 0's is that of the run and holds what all earlier runs finished."""
    partial = partial_directory(out)
    journal = processes.together(lambda: _open_first(out, identity, resume, inputs) if processes.is_first else None)
    journal = processes.together(lambda: journal or Journal.create(_path(partial, processes.rank), identity))
    try:
        yield journal
    finally:
        journal.close()


def finished_by_all(journal: Journal, processes: Processes) -> dict[str, dict]:
    """What earlier runs finished, as rank 0's journal has it."""
    return processes.once(lambda: dict(journal.finished))


def gather_journals(partial: Path, identity: dict, journal: Journal, processes: Processes) -> None:
    """Take what the others have finished into rank 0's journal, which is then the only one."""
    processes.together(lambda: None if processes.is_first else journal.close())
    processes.once(lambda: _absorb(partial, identity, journal))


def _open_first(out: Path, identity: dict, resume: bool, inputs: Sequence[str | os.PathLike[str]]) -> Journal:
    journal = begin_output(out, identity, resume=resume, inputs=inputs)
    try:
        _absorb(partial_directory(out), identity, journal)
    except BaseException:
        journal.close()
        raise
    return journal


def _absorb(partial: Path, identity: dict, journal: Journal) -> None:
    for path in sorted(partial.glob("journal-rank*.jsonl")):
        with Journal.resume(path, identity) as other:
            for key, payload in other.finished.items():
                if key not in journal.finished:
                    journal.append(key, payload)
        path.unlink()


def _path(partial: Path, rank: int) -> Path:
    return partial / f"journal-rank{rank}.jsonl"
