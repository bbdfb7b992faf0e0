"""Errors that say which layer they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from hpa_ext.errors import NumericalError

Naming = Callable[[int], AbstractContextManager[None]]
"""Gives, for the index of a layer, the context in which errors name it."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within the context errors are told with the module's name."""
    try:
        yield
    except NumericalError as error:
        raise error.in_module(name) from error
    except (TypeError, ValueError) as error:
        raise type(error)(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def unnamed(index: int) -> AbstractContextManager[None]:
    """A `Naming` for callers of one layer, who know which it is."""
    return nullcontext()
