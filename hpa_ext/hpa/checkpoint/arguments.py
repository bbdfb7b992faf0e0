"""Paths and devices as callers may give them, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

AnyPath = str | os.PathLike[str]


def input_paths(out: AnyPath, old_adapters: AnyPath | Iterable[AnyPath], **models: AnyPath) -> list[AnyPath]:
    """What is read: the models in the order given, then the adapters, of which there may be one or several.

    Raises TypeError, naming the argument, unless these and `out` are paths.
    """
    several = not isinstance(old_adapters, (str, os.PathLike))
    if several and not isinstance(old_adapters, Iterable):
        raise TypeError(f"old_adapters: expected paths, got {type(old_adapters).__name__}")
    adapters = list(old_adapters) if several else [old_adapters]
    for name, path in [*models.items(), ("out", out), *(("old_adapters", path) for path in adapters)]:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    return [*models.values(), *adapters]


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once it has held a number.

    Raises:
        TypeError, ValueError: it names no device, or none that this machine and this torch have.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a name or a torch.device, got {type(device).__name__}")
    try:
        found = torch.device(device)
        torch.ones((), device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # Torch says AssertionError where it was built without CUDA; of what it says, the first line is the reason.
        raise ValueError(f"device: {str(device)!r} cannot be used here: {str(error).splitlines()[0]:.200}") from error
    return found
