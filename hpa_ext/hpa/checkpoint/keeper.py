"""Makes finished units durable, and takes the files' hashes, while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from hpa_ext.checkpoints.digest import RunningDigest
from hpa_ext.checkpoints.journal import Journal
from hpa_ext.checkpoints.writer import ShardedWriter
from hpa_ext.hpa.checkpoint.pieces import Unit

# Units that are written and not yet on the disk; more would only fill the system's cache.
_MOST_WAITING = 2


class Keeper:
    """One thread that syncs a unit, notes it in the journal, and hashes the file as far as it is written.

    Args:
        digests: whether to hash; only where this process writes all of the files, from start to end.
    """

    def __init__(self, writer: ShardedWriter, journal: Journal, *, digests: bool) -> None:
        self._writer, self._journal = writer, journal
        self._thread = ThreadPoolExecutor(1, "sync")
        self._waiting: deque[Future] = deque()
        self._plans = {plan.file_name: plan for plan in writer.plans}
        self._digests = (
            {name: RunningDigest(writer.descriptor(name), writer.directory / name) for name in self._plans}
            if digests
            else {}
        )

    def finished(self, unit: Unit, payload: Mapping[str, object]) -> None:
        """All pieces of the unit have been written. Waits if too many units are not on the disk yet."""
        self._waiting.append(self._thread.submit(self._keep, unit, payload))
        while len(self._waiting) > _MOST_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait for everything; raises what failed."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown()

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, after `close`."""
        for name, digest in self._digests.items():
            digest.advance(self._plans[name].size)
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def _keep(self, unit: Unit, payload: Mapping[str, object]) -> None:
        self._writer.sync(unit.tensors)
        self._journal.append(unit.key, payload)
        if unit.file_name in self._digests:
            plan = self._plans[unit.file_name]
            self._digests[unit.file_name].advance(plan.ranges[unit.tensors[-1]][1])
