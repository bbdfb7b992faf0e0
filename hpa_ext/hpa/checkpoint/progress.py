"""Bars for long work, on a terminal alone, and what to say when it is interrupted."""

from __future__ import annotations

from tqdm import tqdm


class Progress:
    """One bar at a time; nothing where `shown` is False or stderr is no terminal."""

    def __init__(self, shown: bool) -> None:
        self._disable = None if shown else True
        self._bar: tqdm | None = None

    def begin(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Start a bar; `done` of `total` were finished by an earlier run and do not count for the rate."""
        self.close()
        scale = unit == "B"
        self._bar = tqdm(
            desc=label, total=total, initial=done, unit=unit, unit_scale=scale, unit_divisor=1024 if scale else 1000,
            disable=self._disable, leave=False, smoothing=0.1,
        )  # fmt: skip

    def show(self, text: str) -> None:
        """What is being worked on."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self, count: int) -> None:
        """`count` more are done."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in work that can go on later; its text says how."""
