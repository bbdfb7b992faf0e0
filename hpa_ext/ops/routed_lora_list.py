"""routed_lora of several linears that share their input, such as q/k/v or gate/up, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import (
    DTYPE_TAGS,
    backend_of,
    device_of,
    is_traced,
    on_cuda,
    stream_of,
    use_torch_threads,
    workspace,
)
from hpa_ext.ops._checks import describe
from hpa_ext.ops._library import LIBRARY, register
from hpa_ext.ops._routed_lora_checks import check_linears
from hpa_ext.ops.routed_lora_backward import backward
from hpa_ext.precision import without_autocast


def routed_lora_list(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Tensor,
    scaling: Sequence[Tensor],
    *,
    onto: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`routed_lora` of several linears with the same input, tasks and routing weights, each with its own out and rank.

    Args:
        x: ``[batch, tokens, in]`` bfloat16, float16 or float32 (float64 through torch).
        a: for each linear ``[tasks, rank, in]``, dtype and device of `x`; ranks may differ.
        b: for each linear ``[tasks, out, rank]``, likewise.
        weights: ``[batch, tasks]`` float32 (float64 with float64 x), the routing weights of each sample.
        scaling: for each linear ``[tasks]`` of the dtype of `weights`.
        onto: for each linear ``[batch, tokens, out]`` of the dtype of `x`, to which its branch is added, such as the
            base layer's output; None for the branches alone.

    Returns:
        For each linear ``[batch, tokens, out]`` of the dtype of `x`; new tensors. Bit for bit what `routed_lora` gives
        for each linear alone, and ``onto + routed_lora(...)`` where `onto` is given: the branch is rounded to the dtype
        before it is added, without having been in memory.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or number of an argument; ``a[1]`` is of the second.

    x is read once for all linears; on CUDA the native kernels take one launch for the first products of up to eight
    linears and one for the second. Differentiable in every tensor. HiDe (ACL 2025), equation of the top layer.
    """
    a, b, scaling = _list("a", a), _list("b", b), _list("scaling", scaling)
    added_to = [] if onto is None else _list("onto", onto)
    if onto is not None and len(added_to) != len(a):
        raise ValueError(f"onto: expected {len(a)} tensors, one for each of a, got {len(added_to)}")
    return routed_lora_of(x, a, b, weights, scaling, added_to)


def routed_lora_of(
    x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor], onto: list[Tensor]
) -> list[Tensor]:
    """The one path that every caller of the operation takes, from Python; `onto` empty for nothing."""
    tensors = (x, *a, *b, weights, *scaling, *onto)
    # What is no tensor at all is left to the checks of the direct path, which say so.
    if all(isinstance(t, Tensor) for t in tensors):
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if differentiable or is_traced(*tensors):
            return torch.ops.hpa_ext.routed_lora_list(x, a, b, weights, scaling, onto)
    return _routed_lora_list(x, a, b, weights, scaling, onto)


def _routed_lora_list(
    x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor], onto: list[Tensor]
) -> list[Tensor]:
    outputs = _fake(x, a, b, weights, scaling, onto)
    if not outputs:
        return outputs
    if backend_of("routed_lora", x) == "torch":
        with without_autocast(x):
            branches = [reference.routed_lora(x, *linear) for linear in _each(a, b, weights, scaling)]
            return [branch + to for branch, to in zip(branches, onto, strict=True)] if onto else branches
    launch(x, a, b, weights, scaling, onto, outputs)
    return outputs


def launch(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    weights: Tensor,
    scaling: list[Tensor],
    onto: list[Tensor],
    outputs: list[Tensor],
) -> None:
    """The native kernels, for arguments that have been checked, into contiguous outputs, which may be `onto`."""
    # Contiguous copies must live until the kernels have been launched.
    x, weights = _contiguous(x), _contiguous(weights)
    a, b, scaling, onto = ([_contiguous(t) for t in tensors] for tensors in (a, b, scaling, onto))
    linears = [
        (
            a_.data_ptr(), b_.data_ptr(), scaling_.data_ptr(), onto[index].data_ptr() if onto else 0,
            output.data_ptr(), b_.shape[1], b_.shape[2],
        )
        for index, (a_, b_, scaling_, output) in enumerate(zip(a, b, scaling, outputs, strict=True))
    ]  # fmt: skip
    batch, tokens, in_features = x.shape
    tasks = a[0].shape[0]
    arguments = (
        x.data_ptr(), weights.data_ptr(), DTYPE_TAGS[x.dtype], batch, tokens, in_features, tasks, linears,
    )  # fmt: skip
    if on_cuda(x):
        scratch = workspace(_C.cuda.routed_lora_workspace_bytes(batch, tokens, tasks, linears), x)
        with device_of(x):
            _C.cuda.routed_lora(*arguments, scratch.data_ptr(), stream_of(x))
    else:
        use_torch_threads()
        _C.cpu.routed_lora(*arguments)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


def _each(a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor]):
    return [(a_, b_, weights, scaling_) for a_, b_, scaling_ in zip(a, b, scaling, strict=True)]


def _list(name: str, value: object) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"{name}: expected a list of tensors, one for each linear, got {describe(value)}")


def _fake(
    x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor], onto: list[Tensor]
) -> list[Tensor]:
    check_linears(x, a, b, weights, scaling, onto, "onto")
    return [torch.empty((*x.shape[:2], b_.shape[1]), dtype=x.dtype, device=x.device) for b_ in b]


def _setup_context(ctx, inputs, output) -> None:
    x, a, b, weights, scaling, onto = inputs
    ctx.save_for_backward(x, weights, *a, *b, *scaling)
    ctx.counts = len(a), len(onto)
    ctx.set_materialize_grads(False)


def _backward(ctx, grads: list[Tensor]):
    count, onto_count = ctx.counts
    x, weights, *rest = ctx.saved_tensors
    a, b, scaling = rest[:count], rest[count : 2 * count], rest[2 * count :]
    needs = ctx.needs_input_grad
    found = backward(list(grads), x, a, b, weights, scaling, needs[:5])
    return *found, list(grads) if onto_count else []


register(
    "routed_lora_list(Tensor x, Tensor[] a, Tensor[] b, Tensor weights, Tensor[] scaling, Tensor[] onto) -> Tensor[]",
    _routed_lora_list,
    _fake,
)
torch.library.register_autograd("hpa_ext::routed_lora_list", _backward, setup_context=_setup_context, lib=LIBRARY)
