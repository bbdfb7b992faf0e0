"""The gradients of routed_lora, of one linear or of several that share their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext import _C
from hpa_ext.ops._backend import DTYPE_TAGS, backend_of, is_traced, on_cuda, use_torch_threads
from hpa_ext.ops._library import register
from hpa_ext.ops._routed_lora_checks import check_linears
from hpa_ext.precision import without_autocast

# What is wanted: of x, each a, each b, weights, each scaling.
Needs = tuple[bool, Sequence[bool], Sequence[bool], bool, Sequence[bool]]
Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, list[Tensor | None]]


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Tensor,
    scaling: Sequence[Tensor],
    needs: Needs,
) -> Gradients:
    """The gradients that are needed, in the arguments' dtypes; None for the others.

    Args:
        grads: of the outputs, ``[batch, tokens, out]`` of each linear; None where an output was not used.
        needs: which of x, a, b, weights and scaling need one.

    Everything accumulates in float32 (float64 for float64), and is rounded once: x's gradient after it has been summed
    over the linears. With h = sum of tasks * rank over the linears, at most two intermediates ``[batch * tokens, h]``
    are held in float32, on the CPU those and their copies side by side; nothing of the size of x or of an output is
    widened there. torch (other devices, float64, and where a graph of the gradients is wanted) widens x and the
    outputs' gradients one at a time.
    """
    used = [index for index, grad in enumerate(grads) if grad is not None]
    chosen = [[values[index] for index in used] for values in (grads, a, b, scaling, *needs[1:3], needs[4])]
    grads_, a_, b_, scaling_, need_a, need_b, need_scaling = chosen
    flags = [needs[0], needs[3], *need_a, *need_b, *need_scaling]
    if not used or not any(flags):
        return None, [None] * len(a), [None] * len(a), None, [None] * len(a)
    arguments = grads_, x, a_, b_, weights, scaling_
    tensors = [*grads_, x, *a_, *b_, weights, *scaling_]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(t.requires_grad for t in tensors):
        with without_autocast(x):  # a graph of the gradients was asked for
            found = _differentiable(*arguments, flags)
    elif is_traced(*tensors):
        found = torch.ops.hpa_ext.routed_lora_backward(*arguments, flags)
    else:
        found = _routed_lora_backward(*arguments, flags)
    wanted = iter(found)
    results = [next(wanted) if flag else None for flag in flags]
    per_linear = [[None] * len(a) for _ in range(3)]
    for number, values in enumerate(per_linear):
        for place, index in enumerate(used):
            values[index] = results[2 + number * len(used) + place]
    return results[0], per_linear[0], per_linear[1], results[1], per_linear[2]


def _routed_lora_backward(grads, x, a, b, weights, scaling, needs) -> list[Tensor]:
    """The gradients that are needed, in the order of `needs`: x, weights, each a, each b, each scaling."""
    _fake(grads, x, a, b, weights, scaling, needs)
    if backend_of("routed_lora", x) == "torch" or on_cuda(x):  # CUDA has GEMMs and no kernel of ours
        with torch.no_grad(), without_autocast(x):
            found = _differentiable(grads, x, a, b, weights, scaling, needs)
        # An operator's results own their memory, and the gradients of several A are parts of one product.
        results = _fake(grads, x, a, b, weights, scaling, needs)
        return [result.copy_(value) for result, value in zip(results, found, strict=True)]
    return _native(grads, x, a, b, weights, scaling, needs)


def _fake(grads, x, a, b, weights, scaling, needs) -> list[Tensor]:
    check_linears(x, a, b, weights, scaling, grads, "grads")
    if len(grads) != len(a) or not grads:
        raise ValueError(f"grads: expected one of each linear, and one linear at least, got {len(grads)}")
    if len(needs) != 2 + 3 * len(a):
        raise ValueError(f"needs: expected {2 + 3 * len(a)} flags, got {len(needs)}")
    like = [x, weights, *a, *b, *scaling]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _split(needs: Sequence[bool], count: int) -> tuple[bool, bool, list[bool], list[bool], list[bool]]:
    of_linears = [list(needs[2 + part * count : 2 + (part + 1) * count]) for part in range(3)]
    return bool(needs[0]), bool(needs[1]), *of_linears


def _native(grads, x, a, b, weights, scaling, needs) -> list[Tensor]:
    need_x, need_weights, need_a, need_b, need_scaling = _split(needs, len(a))
    x, weights = x.detach().contiguous(), weights.detach().contiguous()
    batch, tokens, in_features = x.shape
    tasks = a[0].shape[0]
    grad_x = torch.empty_like(x) if need_x else None
    linears, kept, to_a, to_b, to_gate = [], [], [], [], []
    for index, (a_, b_, scaling_, grad) in enumerate(zip(a, b, scaling, grads, strict=True)):
        inputs = [t.detach().contiguous() for t in (a_, b_.mT, scaling_, grad)]
        kept.append(inputs)  # until the kernels are done
        float32 = [
            torch.empty(shape, dtype=torch.float32) if needed else None
            for needed, shape in (
                (need_a[index], a_.shape),
                (need_b[index], inputs[1].shape),
                (need_weights or need_scaling[index], weights.shape),
            )
        ]
        for values, value in zip((to_a, to_b, to_gate), float32, strict=True):
            values.append(value)
        addresses = [0 if t is None else t.data_ptr() for t in float32]
        linears.append((*(t.data_ptr() for t in inputs), b_.shape[1], b_.shape[2], *addresses))
    use_torch_threads()
    _C.cpu.routed_lora_backward(
        x.data_ptr(), weights.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(), DTYPE_TAGS[x.dtype],
        batch, tokens, in_features, tasks, linears,
    )  # fmt: skip
    found = [] if grad_x is None else [grad_x]
    if need_weights:
        found.append(sum(gate * scaling_ for gate, scaling_ in zip(to_gate, scaling, strict=True)))
    found += [grad.to(x.dtype) for grad in to_a if grad is not None]
    found += [
        torch.empty(t.shape, dtype=t.dtype).copy_(grad.mT) for t, grad in zip(b, to_b, strict=True) if grad is not None
    ]
    found += [(gate * weights).sum(0) for gate, needed in zip(to_gate, need_scaling, strict=True) if needed]
    return found


def _differentiable(grads, x, a, b, weights, scaling, needs) -> list[Tensor]:
    """In torch, by products of matrices with the experts, and the linears' A, side by side; itself differentiable."""
    need_x, need_weights, need_a, need_b, need_scaling = _split(needs, len(a))
    batch, tokens, _ = x.shape
    tasks, dtype = a[0].shape[0], weights.dtype
    rows = batch * tokens
    x_ = x.reshape(rows, x.shape[2]).to(dtype)
    ranks = [t.shape[1] for t in a]
    sizes = [tasks * rank for rank in ranks]
    side_by_side = torch.cat([t.reshape(size, t.shape[2]) for t, size in zip(a, sizes, strict=True)]).to(dtype)
    need_gate = [need_weights or need for need in need_scaling]
    need_shrunk = [gate or to_b for gate, to_b in zip(need_gate, need_b, strict=True)]
    shrunk = (x_ @ side_by_side.mT).split(sizes, 1) if any(need_shrunk) else None
    grad_shrunk, to_b, to_gate = [], [], []
    for index, (b_, scaling_, grad) in enumerate(zip(b, scaling, grads, strict=True)):
        g = grad.reshape(rows, grad.shape[2]).to(dtype)
        gate = (weights * scaling_)[:, None, :, None].expand(batch, tokens, tasks, ranks[index])
        gate = gate.reshape(rows, sizes[index])
        grad_gated = g @ b_.transpose(0, 1).reshape(b_.shape[1], sizes[index]).to(dtype)
        grad_shrunk.append(grad_gated * gate)
        if need_b[index]:
            product = g.mT @ (shrunk[index] * gate)  # [out, tasks * rank]
            to_b.append(product.reshape(b_.shape[1], tasks, ranks[index]).transpose(0, 1).to(b_.dtype))
        if need_gate[index]:
            to_gate.append((grad_gated * shrunk[index]).reshape(batch, tokens, tasks, ranks[index]).sum((1, 3)))
        else:
            to_gate.append(None)
    together = torch.cat(grad_shrunk, 1)
    found = [(together @ side_by_side).reshape(x.shape).to(x.dtype)] if need_x else []
    if need_weights:
        found.append(sum(gate * scaling_ for gate, scaling_ in zip(to_gate, scaling, strict=True)))
    if any(need_a):
        of_a = (together.mT @ x_).split(sizes)
        found += [p.reshape(t.shape).to(t.dtype) for p, t, need in zip(of_a, a, need_a, strict=True) if need]
    found += to_b
    found += [(gate * weights).sum(0) for gate, need in zip(to_gate, need_scaling, strict=True) if need]
    return found


register(
    "routed_lora_backward(Tensor[] grads, Tensor x, Tensor[] a, Tensor[] b, Tensor weights, Tensor[] scaling, "
    "bool[] needs) -> Tensor[]",
    _routed_lora_backward,
    _fake,
)
