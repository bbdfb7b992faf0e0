"""Which bytes have been written."""

from __future__ import annotations

import bisect


class Coverage:
    """A set of byte ranges; neighbouring and overlapping ones become one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Add the bytes from `start` up to `stop`."""
        first = bisect.bisect_left(self._stops, start)
        last = bisect.bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def count(self) -> int:
        """How many bytes."""
        return sum(self._stops) - sum(self._starts)
