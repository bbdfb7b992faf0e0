"""gram: the second moment of a layer's input, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext import _C, reference
from hpa_ext.ops._backend import (
    DTYPE_TAGS,
    backend_of,
    device_of,
    gram_kernel,
    is_traced,
    mark_written,
    on_cuda,
    row_stride,
    stream_of,
    unit_stride,
    use_torch_threads,
    workspace,
)
from hpa_ext.ops._checks import WEIGHT_DTYPES, check_same, check_shape, check_tensor
from hpa_ext.ops._library import register
from hpa_ext.precision import without_autocast


def gram_accumulate_(gram: Tensor, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Add ``sum over tokens of x^T x`` to `gram`, in place. No factor, no mean: ``hpa_ext.Gram`` applies 2/n.

    Args:
        gram: ``[in, in]`` float32, symmetric; both triangles are updated.
        x: ``[..., in]`` bfloat16, float16 or float32 (float64 through torch), any strides. Products accumulate in
            float32; bfloat16 products are exact in it. bfloat16 subnormals may count as zero.
        token_mask: ``[...]`` bool, True where a token counts; None counts all. Values of excluded tokens are never
            used, so NaN in padding does no harm.

    Returns:
        `gram`.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or device. `gram` is then unchanged.

    The result is the same for every thread count, but not for every way of cutting the tokens into calls: float32
    sums differ in their last bits. Source: the Hessian of HPA (CVPR 2026) and OBS. Not differentiable.
    """
    if is_traced(gram, x, token_mask):
        torch.ops.hpa_ext.gram_accumulate_(gram, x.detach(), token_mask)
    else:
        _gram_accumulate_(gram, x, token_mask)
    return gram


def check_gram(gram: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless these are arguments of `gram_accumulate_`."""
    check_tensor("x", x, "[..., in]", None, WEIGHT_DTYPES)
    check_tensor("gram", gram, "[in, in]", 2, (torch.float32,))
    check_shape("gram", gram, (x.shape[-1], x.shape[-1]), f"for x with {x.shape[-1]} features")
    check_same("x", x, "gram", gram, dtype=False)
    if token_mask is not None:
        check_tensor("token_mask", token_mask, "[...]", x.dim() - 1, (torch.bool,))
        check_shape("token_mask", token_mask, tuple(x.shape[:-1]), "like the leading dimensions of x")
        check_same("token_mask", token_mask, "gram", gram, dtype=False)


def _gram_accumulate_(gram: Tensor, x: Tensor, token_mask: Tensor | None = None) -> None:
    check_gram(gram, x, token_mask)
    if x.numel() == 0:
        return
    tokens = x.detach().reshape(-1, x.shape[-1])
    mask = None if token_mask is None else token_mask.reshape(-1).contiguous()
    # A view whose columns are not adjacent cannot be handed to a kernel that writes rows.
    target = gram if gram.stride(1) == 1 and gram.stride(0) >= gram.shape[0] else gram.contiguous()
    if backend_of("gram", x) == "native":
        _native(target, unit_stride(tokens), mask)
        mark_written(target)
    else:
        with without_autocast(x):
            reference.gram_accumulate_(target, tokens, mask)
    if target is not gram:
        gram.copy_(target)


def _native(gram: Tensor, x: Tensor, mask: Tensor | None) -> None:
    shape = (DTYPE_TAGS[x.dtype], x.shape[0], x.shape[1], row_stride(x))
    mask_address = 0 if mask is None else mask.data_ptr()
    if on_cuda(x):
        kernel = gram_kernel()
        scratch = workspace(_C.cuda.gram_workspace_bytes(*shape, kernel), x)
        with device_of(x):
            target = gram.data_ptr(), row_stride(gram), scratch.data_ptr(), stream_of(x)
            _C.cuda.gram_accumulate(x.data_ptr(), *shape, mask_address, *target, kernel)
    else:
        use_torch_threads()
        _C.cpu.gram_accumulate(x.data_ptr(), *shape, mask_address, gram.data_ptr(), row_stride(gram))


register("gram_accumulate_(Tensor(a!) gram, Tensor x, Tensor? token_mask=None) -> ()", _gram_accumulate_, check_gram)
