"""What the processes that share a model must agree on, so that none of them waits for another that has given up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.errors import NumericalError
from hpa_ext.models.sharding import is_sharded, mesh_device, meshes

_MESSAGE_BYTES = 4096
_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "NumericalError": NumericalError,
}


class ElsewhereError(NumericalError):
    """Something is wrong in another process, which says more about it."""

    def in_module(self, name: str | None) -> ElsewhereError:
        """See `NumericalError`."""
        return ElsewhereError(self.message, module=name)


@dataclass(frozen=True)
class Agreement:
    """Exchanges of small facts among processes; of one process alone, which has no groups, nothing is exchanged.

    Attributes:
        groups: process groups with the device of their tensors. Those of a mesh with several dimensions are taken one
            dimension after the other, by which every process of the mesh hears of every other.
    """

    groups: tuple[tuple[Any, torch.device], ...] = ()

    @classmethod
    def of_meshes(cls, found: Sequence[Any]) -> Agreement:
        """Of all processes of device meshes."""
        return cls(tuple((mesh.get_group(index), mesh_device(mesh)) for mesh in found for index in range(mesh.ndim)))

    @classmethod
    def of_model(cls, *models: nn.Module) -> Agreement:
        """Of the processes among which a model is sharded."""
        found: list[Any] = []
        for model in models:
            found += [mesh for mesh in meshes(model) if all(mesh != other for other in found)]
        return cls.of_meshes(found)

    @classmethod
    def of_tensor(cls, tensor: object) -> Agreement:
        """Of the processes among which a DTensor is divided."""
        return cls.of_meshes([tensor.device_mesh]) if is_sharded(tensor) else cls()

    @classmethod
    def of_group(cls, group: Any, device: torch.device) -> Agreement:
        """Of a process group (None: the default one), with tensors on `device`."""
        return cls(((group, device),))

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return not self.groups

    def highest(self, values: Sequence[int]) -> list[int]:
        """The largest of each number over all processes."""
        import torch.distributed as dist

        numbers = torch.tensor(list(values), dtype=torch.int64)
        for group, device in self.groups:
            on_device = numbers.to(device)
            dist.all_reduce(on_device, op=dist.ReduceOp.MAX, group=group)
            numbers = on_device.cpu()
        return numbers.tolist()

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on every process; alike in shape and dtype on all."""
        import torch.distributed as dist

        for group, device in self.groups:
            sent = tensor.to(device).contiguous().clone()
            dist.broadcast(sent, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
            tensor = sent.to(tensor.device)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises inside on one process raises on all: with its own error there, with the first one's elsewhere.

        Inside there must be no exchange with other processes, for one that has failed would not take part in it.
        """
        if self.is_alone:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        self.raise_any(own)

    def raise_any(self, own: Exception | None) -> None:
        """Raise if any process calls this with an error: that one its own, the others the first one's."""
        vague = own is None or isinstance(own, ElsewhereError)
        failed, told = self.highest([own is not None, not vague])
        if not failed:
            return
        # A process takes its text into the next group's exchange, so every process hears of one.
        text = b"" if own is None or (vague and told) else _packed(own)
        import torch.distributed as dist

        for group, device in self.groups:
            size = dist.get_world_size(group)
            table = torch.zeros((size, _MESSAGE_BYTES), dtype=torch.uint8)
            table[dist.get_rank(group), : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
            table = table.to(device)
            dist.all_reduce(table, group=group)
            lines = [bytes(line.tolist()).rstrip(b"\0") for line in table.cpu()]
            text = text or next((line for line in lines if line), b"")
        if own is not None and not (vague and told):
            raise own
        raise _unpacked(text) from own


def _packed(error: Exception) -> bytes:
    import torch.distributed as dist

    numerical = isinstance(error, NumericalError)
    value = {
        "kind": next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "RuntimeError"),
        "text": f"{error.message if numerical else error} (process {dist.get_rank()})",
        "module": error.module if numerical else None,
        "failing_minor": error.failing_minor if numerical else None,
        "damping": error.damping if numerical else None,
    }
    room = _MESSAGE_BYTES - len(json.dumps({**value, "text": ""}))
    while len(json.dumps(value["text"])) > room:
        value["text"] = value["text"][: len(value["text"]) * 9 // 10]
    return json.dumps(value).encode()


def _unpacked(text: bytes) -> Exception:
    value = json.loads(text)
    kind = _ERRORS.get(value["kind"], RuntimeError)
    if kind is NumericalError:
        return NumericalError(
            value["text"], module=value["module"], failing_minor=value["failing_minor"], damping=value["damping"]
        )
    return kind(value["text"])
