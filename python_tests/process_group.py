"""Runs functions named ``check_...`` of a module in several gloo processes, started once, and keeps the outcomes.

Starting processes takes seconds, so the checks of a module share them; each becomes a test of its own.
"""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing


class Unsupported(Exception):
    """What this installation lacks for a check; the test is skipped with the reason."""


_SKIPPED = "skipped: "
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here"
)

_PRELOADED = ("pytest", "transformers.models.llama.modeling_llama", "peft")


def check_names(module_name: str, processes: int | None = None) -> list[str]:
    """The checks of a module; with `processes`, those that are marked for so many."""
    module = importlib.import_module(module_name)
    names = [name for name in vars(module) if name.startswith("check_")]
    return [name for name in names if processes is None or getattr(module, name).processes == processes]


def on(processes: int):
    """Marks a check with the number of processes that it runs on."""

    def mark(function):
        function.processes = processes
        return function

    return mark


def run_checks(module_name: str, processes: int, directory: Path) -> dict[str, list[str]]:
    """What each process tells of each check; "" where all is well."""
    # One server imports torch, and every process of every such test is forked from it.
    multiprocessing.set_forkserver_preload(
        ["hpa_ext", "torch.distributed.fsdp", "torch.distributed.tensor", *_PRELOADED]
    )
    ended = "did not get so far"
    try:
        torch.multiprocessing.start_processes(
            _work, (processes, module_name, str(directory)), nprocs=processes, start_method="forkserver"
        )
    except Exception as error:  # a process has died, or waited for the others in vain
        ended = f"the processes ended: {error}"
    files = [directory / f"{rank}.json" for rank in range(processes)]
    outcomes = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {name: [told.get(name, ended) for told in outcomes] for name in check_names(module_name, processes)}


def outcomes_fixture(module_name: str):
    """A fixture: ``outcomes(processes)`` runs the checks of a module once, and keeps what was told of each."""

    @pytest.fixture(scope="module")
    def outcomes(tmp_path_factory):
        kept: dict[int, dict[str, list[str]]] = {}

        def of(processes: int) -> dict[str, list[str]]:
            if processes not in kept:
                kept[processes] = run_checks(module_name, processes, tmp_path_factory.mktemp(f"processes{processes}"))
            return kept[processes]

        return of

    return outcomes


def judge(outcome: list[str]) -> None:
    """Fail or skip the test of a check, as its processes say."""
    wrong = [f"process {rank}:\n{text}" for rank, text in enumerate(outcome) if text and not text.startswith(_SKIPPED)]
    assert not wrong, "\n".join(wrong)
    if any(outcome):
        pytest.skip(outcome[0].removeprefix(_SKIPPED))


def _work(rank: int, processes: int, module_name: str, directory: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    module = importlib.import_module(module_name)
    outcomes = {}
    for name in check_names(module_name, processes):
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            getattr(module, name)()
            outcomes[name] = ""
        except Unsupported as error:
            outcomes[name] = f"{_SKIPPED}{error}"
        except Exception:
            outcomes[name] = traceback.format_exc()
        # Written at once, so that a later check that ends the process does not take this one along.
        Path(directory, f"{rank}.json").write_text(json.dumps(outcomes))
        if rank == 0:
            print(f"{name} on {processes} processes: {time.perf_counter() - started:.2f} s", flush=True)
        dist.barrier()
    dist.destroy_process_group()
