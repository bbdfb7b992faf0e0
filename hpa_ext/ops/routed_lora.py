"""routed_lora: several LoRA experts on one input, weighted for each sample."""

from __future__ import annotations

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
from hpa_ext.ops._checks import WEIGHT_DTYPES, check_same, check_shape, check_tensor
from hpa_ext.ops._library import LIBRARY, register
from hpa_ext.precision import without_autocast


def routed_lora(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """``y[s] = sum over tasks c of weights[s, c] * scaling[c] * B_c A_c x[s]``, for every sample s of the batch.

    Args:
        x: ``[batch, tokens, in]`` bfloat16, float16 or float32 (float64 through torch).
        a: ``[tasks, rank, in]``, the experts' A, dtype and device of `x`.
        b: ``[tasks, out, rank]``, the experts' B, likewise.
        weights: ``[batch, tasks]`` float32 (float64 with float64 x), the routing weights of each sample.
        scaling: ``[tasks]`` of the dtype of `weights`, LoRA's alpha / rank of each expert.

    Returns:
        ``[batch, tokens, out]`` of the dtype of `x`: the branch alone, to be added to the base layer's output.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument.

    Both products accumulate in float32. Differentiable in x, a, b, weights and scaling. HiDe (ACL 2025), equation of
    the top layer.
    """
    tensors = (x, a, b, weights, scaling)
    # What is no tensor at all is left to the checks of the direct path, which say so.
    if all(isinstance(t, Tensor) for t in tensors):
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if differentiable or is_traced(*tensors):
            return torch.ops.hpa_ext.routed_lora(*tensors)
    return _routed_lora(x, a, b, weights, scaling)


def _routed_lora(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    output = _fake(x, a, b, weights, scaling)
    if backend_of("routed_lora", x) == "torch":
        with without_autocast(x):
            return reference.routed_lora(x, a, b, weights, scaling)
    x, a, b, weights, scaling = (t.detach().contiguous() for t in (x, a, b, weights, scaling))
    batch, tokens, in_features = x.shape
    tasks, rank, _ = a.shape
    arguments = (
        x.data_ptr(), a.data_ptr(), b.data_ptr(), weights.data_ptr(), scaling.data_ptr(), output.data_ptr(),
        DTYPE_TAGS[x.dtype], batch, tokens, in_features, b.shape[1], tasks, rank,
    )  # fmt: skip
    if on_cuda(x):
        scratch = workspace(_C.cuda.routed_lora_workspace_bytes(batch, tokens, tasks, rank), x)
        with device_of(x):
            _C.cuda.routed_lora(*arguments, scratch.data_ptr(), stream_of(x))
    else:
        use_torch_threads()
        _C.cpu.routed_lora(*arguments)
    return output


def _fake(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    check_tensor("x", x, "[batch, tokens, in]", 3, WEIGHT_DTYPES)
    check_tensor("a", a, "[tasks, rank, in]", 3)
    check_tensor("b", b, "[tasks, out, rank]", 3)
    tasks, rank, out_features = a.shape[0], a.shape[1], b.shape[1]
    if rank < 1:
        raise ValueError("a: expected [tasks, rank, in] with rank at least 1, got rank 0")
    check_shape("a", a, (tasks, rank, x.shape[2]), f"for x with {x.shape[2]} features")
    check_shape("b", b, (tasks, out_features, rank), "for a of this many tasks and this rank")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value, shape in (("weights", weights, (x.shape[0], tasks)), ("scaling", scaling, (tasks,))):
        check_tensor(name, value, str(list(shape)), len(shape), (dtype,))
        check_shape(name, value, shape, "for this batch and these tasks")
        check_same(name, value, "x", x, dtype=False)
    check_same("a", a, "x", x)
    check_same("b", b, "x", x)
    return torch.empty((x.shape[0], x.shape[1], out_features), dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    """Adjoint of the two products; the intermediate is computed again rather than kept."""
    x, a, b, weights, scaling = ctx.saved_tensors
    dtype = weights.dtype
    x_, a_, b_, g = (t.to(dtype) for t in (x, a, b, grad))
    gate = weights[:, None, :, None] * scaling[None, None, :, None]  # [batch, 1, tasks, 1]
    shrunk = torch.einsum("bti,cri->btcr", x_, a_)
    grad_gated = torch.einsum("bto,cor->btcr", g, b_)
    grad_shrunk = grad_gated * gate
    grad_gate = (grad_gated * shrunk).sum(dim=(1, 3))  # [batch, tasks]
    grad_x = torch.einsum("btcr,cri->bti", grad_shrunk, a_).to(x.dtype)
    grad_a = torch.einsum("btcr,bti->cri", grad_shrunk, x_).to(a.dtype)
    grad_b = torch.einsum("bto,btcr->cor", g, shrunk * gate).to(b.dtype)
    return grad_x, grad_a, grad_b, grad_gate * scaling, (grad_gate * weights).sum(0)


register("routed_lora(Tensor x, Tensor a, Tensor b, Tensor weights, Tensor scaling) -> Tensor", _routed_lora, _fake)
torch.library.register_autograd("hpa_ext::routed_lora", _backward, setup_context=_setup_context, lib=LIBRARY)
