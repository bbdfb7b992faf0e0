"""The processes of a torch.distributed job, or the one process that there is."""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

_LONGEST_WAIT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Of the default group; one process where torch.distributed is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which does what is done once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every process, each getting its own result; if it raised on one, every process raises.

        `work` must not wait for other processes, so that one that fails holds up nobody.

        Raises:
            RuntimeError: another process failed; names it and what it raised.
        """
        if self.count == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # even an interrupt must reach the others, which wait in the gathering
            failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(f"process {rank} of {self.count} failed: {text}")
        return result

    def once(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 alone; every process gets its result, or an exception."""
        return self.gather(self.together(lambda: work() if self.is_first else None))[0]


@contextmanager
def torchrun_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, as its environment variables say, and leave them at the end.

    With GPUs, "cuda" is afterwards each process's own: that of its number on the machine.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A process that has finished its part waits for the slowest one: hours, not torch's half of one. One that has died
    # is noticed at once all the same, since its connection ends.
    dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
        # A group that lives on in a reference cycle until the interpreter ends aborts the process there.
        gc.collect()
