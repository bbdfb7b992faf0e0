"""First phase: the diagonal of each Gram's inverse, once, with one Gram in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.journal import Journal
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.grams import leaders
from hpa_ext.hpa.checkpoint.job import Job
from hpa_ext.hpa.checkpoint.progress import Progress
from hpa_ext.hpa.checkpoint.records import diagonal_of, diagonal_record
from hpa_ext.processes import Processes

SETS = ("safety", "task")

Item = tuple[str, str]


def reduce_grams(
    job: Job,
    finished: Mapping[str, dict],
    journal: Journal,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> dict[str, dict[str, GramDiagonal]]:
    """``{"safety": {module: GramDiagonal}, "task": ...}`` on the CPU, for every module of the job.

    Args:
        finished: what earlier runs have in their journals.
        journal: where this process writes what it finishes.
    """
    wanted = []
    leader_of = {name: leaders(getattr(job, name), job.names) for name in SETS}
    for name in SETS:
        wanted += [(name, leader) for leader in dict.fromkeys(leader_of[name].values())]
    todo = [item for item in wanted if _key(*item) not in finished]
    width = {item: job.linears[item[1]].base_weight().shape[1] for item in todo}
    mine = share(todo, width, processes.rank, processes.count)
    progress.begin("inverse diagonals", len(mine), "Gram")

    def work() -> dict[str, dict]:
        records = {}
        for name, leader in mine:
            progress.show(f"{leader} ({name})")
            record = diagonal_record(_reduced(job, name, leader, device))
            journal.append(_key(name, leader), record)
            records[_key(name, leader)] = record
            progress.advance(1)
        return records

    known = dict(finished)
    for records in processes.gather(processes.together(work)):
        known |= records
    diagonals = {item: diagonal_of(known[_key(*item)]) for item in wanted}
    return {name: {module: diagonals[name, leader_of[name][module]] for module in job.names} for name in SETS}


def share(items: Iterable[Item], width: Mapping[Item, int], rank: int, ranks: int) -> list[Item]:
    """The Grams of one of several processes: of each width as many as the others have, give or take one.

    The time grows with the cube of the width, and the widest come last in every decoder layer.
    """
    return sorted(items, key=lambda item: -width[item])[rank::ranks]


def _reduced(job: Job, name: str, leader: str, device: torch.device) -> GramDiagonal:
    gram = getattr(job, name)[leader]
    try:
        if isinstance(gram, Gram):
            if gram.device != device:
                state = gram.state_dict()
                gram = Gram.from_state_dict({**state, "sum": state["sum"].to(device)})
            return GramDiagonal.of(gram, job.config.damping, rescue=job.config.rescue)
        # Raises if it was reduced with another damping, or with a rescue that is not allowed.
        gram.inverse_diagonal_report(
            job.config.damping, normalization=job.config.normalization, rescue=job.config.rescue
        )
        return gram
    except NumericalError as error:
        raise error.in_module(f"{leader} ({name} Gram)") from error
    except ValueError as error:
        raise ValueError(f"{leader} ({name} Gram): {error}") from error
    finally:
        # A Gram file keeps the last Gram, and the other set's would be held beside the next one of this.
        if isinstance(getattr(job, name), GramFile):
            getattr(job, name).forget()


def _key(name: str, leader: str) -> str:
    return f"gram:{name}:{leader}"
