"""Reading, computing and writing at the same time, with never more than a few items in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


def run_pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    compute: Callable[[Item, Read], Made],
    write: Callable[[Item, Made], None],
) -> None:
    """For each item in order: ``write(item, compute(item, read(item)))``.

    `read` runs in a thread one item ahead, `write` in another one item behind, `compute` in the calling one, so at
    most three items are in memory. `write` is called in the order of the items. The first exception of any of them, or
    a KeyboardInterrupt, ends the run; what had been handed to `write` is written before it is raised.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        pending: deque[tuple[Item, Future]] = deque()
        written: Future | None = None
        source = iter(items)
        try:
            _read_ahead(source, pending, reader, read)
            while pending:
                item, loading = pending.popleft()
                loaded = loading.result()
                del loading  # a future keeps its result
                _read_ahead(source, pending, reader, read)
                made = compute(item, loaded)
                del loaded
                if written is not None:
                    written.result()
                written = writer.submit(write, item, made)
                del made
        except BaseException:
            for _, loading in pending:
                loading.cancel()
            raise
        finally:
            pending.clear()
        if written is not None:
            written.result()


def _read_ahead(source: Iterable[Item], pending: deque, reader: ThreadPoolExecutor, read: Callable) -> None:
    for item in source:
        pending.append((item, reader.submit(read, item)))
        return
