"""What both ways of calibrating a checkpoint work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.calibrating.loading import LoadableModel, prefixes
from hpa_ext.calibrating.store import GramStore
from hpa_ext.gram_collector import GramCollector
from hpa_ext.model_calls import model_inputs
from hpa_ext.models.linear import Linear
from hpa_ext.models.structure import decoder_name
from hpa_ext.processes import Processes
from hpa_ext.token_masks import check_mask

SelectTokens = Callable[[Mapping[str, Any], nn.Module], "Tensor | None"]


class Batches(Protocol):
    """Batches of model inputs by number, each made when it is asked for, and the same whenever it is."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CalibrationRun:
    """A model on disk, the linears whose inputs are wanted, the batches, and where the Grams go.

    Attributes:
        model: with nothing loaded yet.
        linears: by name, of `model.module`.
        head: the names among them that are the output head.
        batches: of all processes.
        select_tokens: which tokens of a batch count, see `token_masks.resolve`.
        processes: who takes part.
        store: takes the Grams; what it has already is not calibrated again.
        progress: show a bar when stderr is a terminal.
    """

    model: LoadableModel
    linears: dict[str, Linear]
    head: set[str]
    batches: Batches
    select_tokens: SelectTokens
    processes: Processes
    store: GramStore
    progress: bool

    def mine(self) -> range:
        """Numbers of the batches that this process takes."""
        return range(self.processes.rank, len(self.batches), self.processes.count)

    def inputs(self, number: int) -> tuple[dict[str, Any], Tensor | None]:
        """Keyword arguments of the model for a batch, on its device and of its dtype, and the mask of tokens."""
        _, keywords = model_inputs(self.batches[number], self.model.device)
        mask = check_mask(self.select_tokens(keywords, self.model.module))
        keywords.pop("labels", None)
        for key, value in keywords.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                keywords[key] = value.to(self.model.dtype)
        return keywords, mask

    def collector(self, names: list[str]) -> GramCollector:
        """Hooks for some of the linears."""
        chosen = {name: self.linears[name] for name in names}
        return GramCollector(chosen, decoder_name(self.model.module), self.head)

    def pending(self) -> list[str]:
        """Names of the linears whose Grams are not in the store."""
        return [name for name in self.linears if name not in self.store.finished]

    def bar(self, total: int, unit: str) -> tqdm:
        """Rate and time left, in one process's terminal."""
        shown = self.progress and self.processes.is_first
        return tqdm(total=total, desc="calibrate", unit=unit, leave=False, disable=None if shown else True)


def without_head(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor's name is outside of the output head, which a forward that ends early does not need."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {name for name, module in model.named_modules() if module is head} if head is not None else set()
    inside = prefixes(names)
    return lambda name: not inside(name)


def in_device_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU, without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 8 << 30
