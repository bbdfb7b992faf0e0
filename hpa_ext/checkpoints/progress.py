"""How far a walk over many bytes is: one line on a terminal, written over."""

from __future__ import annotations

import sys
import threading
import time

_INTERVAL_SECONDS = 0.2


class ByteProgress:
    """Counts bytes and shows percent, rate and time left on standard error, if that is a terminal; a context.

    Args:
        label: what is going on, such as "verifying".
        total: bytes in all.
        shown: False to stay silent.
    """

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        self._label = label
        self._total = max(total, 1)
        self._shown = shown and sys.stderr.isatty()
        self._done = 0
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many bytes more are done. Safe to call from several threads."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if not self._shown or now - self._last < _INTERVAL_SECONDS:
                return
            self._last = now
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            text = f"{self._label} {100 * self._done / self._total:5.1f} %, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
