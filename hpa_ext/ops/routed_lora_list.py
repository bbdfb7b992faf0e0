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
from hpa_ext.ops._checks import WEIGHT_DTYPES, check_same, check_shape, check_tensor, describe
from hpa_ext.ops._library import LIBRARY, register
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
        TypeError, ValueError: wrong type, dtype, shape, device or number of an argument; ``a[1]`` is the second linear's.

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
    # Contiguous copies must live until the kernels have been launched.
    x, weights = x.detach().contiguous(), weights.detach().contiguous()
    a, b, scaling, onto = ([t.detach().contiguous() for t in tensors] for tensors in (a, b, scaling, onto))
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
    return outputs


def _each(a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor]):
    return [(a_, b_, weights, scaling_) for a_, b_, scaling_ in zip(a, b, scaling, strict=True)]


def _list(name: str, value: object) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"{name}: expected a list of tensors, one for each linear, got {describe(value)}")


def _fake(
    x: Tensor, a: list[Tensor], b: list[Tensor], weights: Tensor, scaling: list[Tensor], onto: list[Tensor]
) -> list[Tensor]:
    """The checks, and results without data."""
    check_tensor("x", x, "[batch, tokens, in]", 3, WEIGHT_DTYPES)
    for name, value in (("b", b), ("scaling", scaling), *([("onto", onto)] if onto else [])):
        if len(value) != len(a):
            raise ValueError(f"{name}: expected {len(a)} tensors, one for each of a, got {len(value)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs = []
    for index in range(len(a)):
        of = f"[{index}]" if len(a) > 1 else ""
        a_, b_, scaling_ = a[index], b[index], scaling[index]
        check_tensor(f"a{of}", a_, "[tasks, rank, in]", 3)
        check_tensor(f"b{of}", b_, "[tasks, out, rank]", 3)
        tasks, rank, out_features = a[0].shape[0], a_.shape[1], b_.shape[1]
        if rank < 1:
            raise ValueError(f"a{of}: expected [tasks, rank, in] with rank at least 1, got rank 0")
        check_shape(f"a{of}", a_, (tasks, rank, x.shape[2]), f"for x with {x.shape[2]} features, tasks as in the first a")
        check_shape(f"b{of}", b_, (tasks, out_features, rank), "for a of this many tasks and this rank")
        shapes = (("weights", weights, (x.shape[0], tasks)), (f"scaling{of}", scaling_, (tasks,)))
        for name, value, shape in shapes if index == 0 else shapes[1:]:
            check_tensor(name, value, str(list(shape)), len(shape), (dtype,))
            check_shape(name, value, shape, "for this batch and these tasks")
            check_same(name, value, "x", x, dtype=False)
        check_same(f"a{of}", a_, "x", x)
        check_same(f"b{of}", b_, "x", x)
        shape = (x.shape[0], x.shape[1], out_features)
        if onto:
            check_tensor(f"onto{of}", onto[index], "[batch, tokens, out]", 3)
            check_shape(f"onto{of}", onto[index], shape, "like the branch that is added to it")
            check_same(f"onto{of}", onto[index], "x", x)
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device))
    return outputs


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
