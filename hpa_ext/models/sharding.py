"""How a weight is divided among processes: DTensors as FSDP2's ``fully_shard`` makes them, and what is refused.

No full weight is ever gathered here: each process works on its own rows or columns.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_sharded(value: object) -> TypeGuard[Tensor]:
    """Whether the value is a DTensor, a tensor that is divided among or repeated on the processes of a mesh."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has a DTensor without it
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, as a detached view; of another tensor all of it, detached."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor of mesh, placements and shape of `like` of which `part` is this process's part."""
    from torch.distributed.tensor import DTensor

    if part.device.type != like.device_mesh.device_type:  # offloaded to the CPU; from_local would fetch it
        result = torch.empty_like(like, dtype=part.dtype)
        local(result).copy_(part)
        return result
    stride = (like.shape[1], 1)  # of the whole, were it contiguous: only its shape counts
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride)


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of `like` and, if only `like` is a DTensor, this process's part of it as one.

    A full weight on every process is so compared with a sharded one without any exchange.
    """
    if not is_sharded(like):
        return tensor if is_sharded(tensor) else tensor.to(like.device)
    part = local(tensor) if is_sharded(tensor) else tensor[part_of(like)]
    device = local(like).device
    if is_sharded(tensor) and part.device == device:
        return tensor
    check = is_sharded(tensor) and tuple(tensor.placements) != tuple(like.placements)
    return tensor if check else from_local(part.to(device), like)


def describe_placements(tensor: Tensor) -> str:
    """``mesh (2, 4) with placements [Replicate(), Shard(dim=0)]``."""
    placements = ", ".join(str(placement) for placement in tensor.placements)
    return f"mesh {tuple(tensor.device_mesh.shape)} with placements [{placements}]"


def check_placements(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless every placement of a DTensor is a plain Shard or Replicate."""
    from torch.distributed.tensor import Replicate, Shard

    for placement in tensor.placements:
        # Subclasses of Shard (such as the strided one of FSDP with tensor parallelism) order the rows otherwise.
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"{name}: expected a DTensor with the placements Shard(0), Shard(1) and Replicate(), "
                f"got {describe_placements(tensor)}"
            )


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are plain, or both are DTensors that are divided in the same way."""
    if not is_sharded(tensor) and not is_sharded(other):
        return
    for key, value in ((name, tensor), (other_name, other)):
        if is_sharded(value):
            check_placements(key, value)
    kinds = [describe_placements(t) if is_sharded(t) else "a plain tensor" for t in (tensor, other)]
    if not is_sharded(tensor) or not is_sharded(other):
        raise ValueError(
            f"{name}: expected the same kind of tensor as {other_name}, {kinds[1]}, got {kinds[0]}; "
            "use distribute_tensor with the other's mesh and placements"
        )
    if tensor.device_mesh != other.device_mesh or tuple(tensor.placements) != tuple(other.placements):
        raise ValueError(
            f"{name}: expected {kinds[1]} like {other_name}, got {kinds[0]}; use redistribute() on one of them"
        )


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """Which rows and columns of a DTensor this process holds, one slice for each dimension."""
    from torch.distributed.tensor import Shard

    bounds = [[0, size] for size in tensor.shape]
    for index, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard):
            continue
        start, stop = bounds[placement.dim]
        # As torch.chunk: equal parts, rounded up; the last ones may be short or empty.
        chunk = -(-(stop - start) // tensor.device_mesh.size(index))
        first = min(start + chunk * tensor.device_mesh.get_local_rank(index), stop)
        bounds[placement.dim] = [first, min(first + chunk, stop)]
    found = tuple(slice(start, stop) for start, stop in bounds)
    expected = [part.stop - part.start for part in found]
    if list(local(tensor).shape) != expected:
        raise ValueError(
            f"expected a local part {expected} of a DTensor {list(tensor.shape)} on {describe_placements(tensor)}, "
            f"got {list(local(tensor).shape)}"
        )
    return found


def local_tokens(x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The activations ``[..., in]`` that this process holds, and their mask ``[...]``, of DTensors or plain tensors.

    Raises:
        ValueError: x is sharded over its features or partial, or the mask is a DTensor that is divided otherwise.
    """
    if not is_sharded(x):
        if is_sharded(token_mask):
            raise ValueError("token_mask: expected a plain tensor like x, got a DTensor")
        return x, token_mask
    from torch.distributed.tensor import Replicate, Shard

    for placement in x.placements:
        over_tokens = type(placement) is Shard and placement.dim % x.dim() != x.dim() - 1
        if not over_tokens and type(placement) is not Replicate:
            raise ValueError(
                f"x: expected a DTensor that is replicated or sharded over tokens or samples, got {list(x.shape)} on "
                f"{describe_placements(x)}; a Gram needs all features of a token on one process"
            )
    if is_sharded(token_mask):
        if tuple(token_mask.placements) != tuple(x.placements):
            raise ValueError(
                f"token_mask: expected {describe_placements(x)} like x, got {describe_placements(token_mask)}"
            )
        token_mask = local(token_mask)
    return local(x), token_mask


def sharding_groups(tensor: Tensor) -> list[Any]:
    """The process groups over which the parts of a DTensor add up to the whole: one for each sharded dimension."""
    from torch.distributed.tensor import Shard

    mesh = tensor.device_mesh
    return [mesh.get_group(index) for index, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]


def mesh_device(mesh: Any) -> torch.device:
    """Where tensors must be that the mesh's processes exchange (weights may be offloaded to the CPU)."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def meshes(model: nn.Module) -> list[Any]:
    """The distinct device meshes of a model's DTensors, in the order of its parameters."""
    found: list[Any] = []
    for parameter in model.parameters():
        if is_sharded(parameter) and all(parameter.device_mesh != mesh for mesh in found):
            found.append(parameter.device_mesh)
    return found


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its own shards again.

    After a forward FSDP2 keeps the weights of its root gathered; what is written to such a weight would be lost.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_other_sharding(argument: str, model: nn.Module) -> None:
    """Raise ValueError for a model under FSDP1 or DeepSpeed ZeRO-3, whose modules do not hold weights of their own."""
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FullyShardedDataParallel

        for name, module in model.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise ValueError(
                    f"{argument}: {name or type(module).__name__} is wrapped by FullyShardedDataParallel (FSDP1), "
                    "which flattens the weights; use FSDP2 (fully_shard, or accelerate with fsdp_version=2)"
                )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{argument}: {name} is partitioned by DeepSpeed ZeRO-3, which leaves the module an empty weight; use "
                "FSDP2 (fully_shard, or accelerate with fsdp_version=2), ZeRO-2 or less"
            )
