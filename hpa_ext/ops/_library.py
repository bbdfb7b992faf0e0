"""Registration of the operations with torch.library: schema, implementation and fake, in one call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("hpa_ext", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.hpa_ext.<name>``.

    `implementation` checks its arguments and dispatches by device itself, so one function serves every backend.
    `fake` gives shapes and dtypes of the results without data, and makes the same checks of shape and dtype.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hpa_ext::{name}", fake, lib=LIBRARY)
