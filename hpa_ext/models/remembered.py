"""The weights of a model's linears as they are now, kept while the model is tuned further."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpa_ext.models.linears import find_linears
from hpa_ext.models.sharding import describe_placements, is_sharded, local, refuse_other_sharding, reshard


@dataclass(frozen=True)
class RememberedLinear:
    """A copy of a linear's weight: all of it, or of a DTensor this process's part.

    Attributes:
        name: of the linear.
        part: ``[out, in]``, or this process's rows and columns.
        shape: ``(out, in)`` of the whole weight.
        placements: how it was divided, in words; "" for a plain weight.
    """

    name: str
    part: Tensor
    shape: tuple[int, int]
    placements: str

    def weight_like(self, new: Tensor) -> Tensor:
        """The weight on the device and, of a DTensor, with the mesh and placements of the new one."""
        placements = describe_placements(new) if is_sharded(new) else ""
        if placements != self.placements:
            raise ValueError(
                f"{self.name}: expected a weight on {placements or 'one process'} like the new one, got one that was "
                f"remembered on {self.placements or 'one process'}"
            )
        if not placements:
            return self.part.to(new.device)
        result = torch.empty_like(new)
        local(result).copy_(self.part)
        return result


class RememberedWeights:
    """Copies of the weights of a model's linears, to harmonize the same model with after it was tuned.

    ``old = RememberedWeights.of(model)`` before the step, ``harmonize_model(old, model, ...)`` after it: one copy of
    the covered weights on the host instead of a second model. Under FSDP2 every process keeps its own part.
    """

    def __init__(self, linears: dict[str, RememberedLinear]) -> None:
        self.linears = linears

    @classmethod
    def of(
        cls, model: nn.Module, modules: str | Iterable[str] | None = None, device: torch.device | str = "cpu"
    ) -> RememberedWeights:
        """Copy the weights that act: those of a PeftModel with its active updates.

        Args:
            model: as for `harmonize_model`. Under FSDP2 every process must call this.
            modules: as for `harmonize_model`.
            device: where the copies are kept.
        """
        refuse_other_sharding("model", model)
        reshard(model)
        copies: dict[int, tuple[Tensor, tuple[int, int], str]] = {}
        linears = {}
        for name, linear in find_linears(model, modules).items():
            linear.refuse_unsupported()
            key = id(linear.module) if linear.has_pending_adapters() else linear.storage_key
            if key not in copies:
                weight = linear.weight()
                placements = describe_placements(weight) if is_sharded(weight) else ""
                copies[key] = (local(weight).to(device, copy=True), tuple(weight.shape), placements)
            linears[name] = RememberedLinear(name, *copies[key])
        return cls(linears)

    @property
    def nbytes(self) -> int:
        """Bytes that this process keeps."""
        return sum(
            {part.data_ptr(): part.nbytes for part in (linear.part for linear in self.linears.values())}.values()
        )

    def __len__(self) -> int:
        return len(self.linears)
