"""How the Grams of several processes become one: what travels, and what must be alike first."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpa_ext.agreement import Agreement

if TYPE_CHECKING:
    from hpa_ext.gram import Gram

# Of a sum that travels: 45 MB at 22,000 features, so that little memory is taken besides.
_ROWS_AT_A_TIME = 512


def initialised(caller: str) -> ModuleType:
    """torch.distributed; RuntimeError if no process group is there."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{caller}: torch.distributed is not initialised; call init_process_group first")
    return dist


def exchange_triangle(total: Tensor, exchange: Callable[[Tensor], Any], keep: bool = True) -> None:
    """Replace a symmetric matrix by what `exchange` makes, in place, of copies of strips of its upper triangle.

    Args:
        total: ``[in, in]``, written unless `keep` is False (a process that only contributes).
        exchange: the same number of strips of the same shapes on every process, ``[rows, columns]`` each.
        keep: see `total`.
    """
    size = total.shape[0]
    for start in range(0, size, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, size)
        strip = total[start:stop, start:].clone(memory_format=torch.contiguous_format)
        exchange(strip)
        if keep:
            total[start:stop, start:] = strip
            total[stop:, start:stop] = strip[:, stop - start :].mT


def check_alike(grams: Mapping[str, Gram], group: Any = None) -> None:
    """Raise ValueError on every process of the group unless all have Grams of the same modules, shared alike."""
    first: dict[int, str] = {}
    for name, gram in grams.items():
        first.setdefault(id(gram), name)
    text = json.dumps([[name, first[id(gram)], gram.in_features] for name, gram in grams.items()])
    device = next((gram.device for gram in grams.values()), torch.device("cpu"))
    processes = Agreement.of_group(group, device)
    ours = torch.tensor([len(grams), len(first), zlib.crc32(text.encode())])
    theirs = processes.of_first(ours)
    with processes.together():
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"grams: expected the first process's {theirs[0]} modules with {theirs[1]} inputs, got {ours[0]} with "
                f"{ours[1]}, or others; every process must calibrate the same modules, and its batches must reach all"
            )
