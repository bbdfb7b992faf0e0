"""gram over several samples at once: what small samples cost is reading and writing the Gram, and that happens once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpa_ext import _C
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
    workspace,
)
from hpa_ext.ops.gram import check_gram, gram_accumulate_


def gram_accumulate_list_(
    gram: Tensor, xs: Sequence[Tensor], token_masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """Add ``sum over samples and tokens of x^T x`` to `gram`, in place: `gram_accumulate_` for a list of samples.

    Args:
        gram: ``[in, in]`` float32, symmetric; both triangles are updated.
        xs: samples ``[..., in]``, each as `gram_accumulate_` takes it.
        token_masks: for each sample ``[...]`` bool or None; None counts all tokens.

    Returns:
        `gram`.

    Raises:
        TypeError, ValueError: a sample or a mask is not as above, or their numbers differ. `gram` is then unchanged.

    The native CUDA kernel "wgmma" adds up to 24 samples of one dtype in one launch; everything else takes the samples
    one after the other. The tokens are cut otherwise than in single calls, so that the last bits may differ.
    """
    masks = [None] * len(xs) if token_masks is None else list(token_masks)
    if len(masks) != len(xs):
        raise ValueError(f"token_masks: expected {len(xs)}, one for each sample, got {len(masks)}")
    for x, mask in zip(xs, masks, strict=True):
        check_gram(gram, x, mask)
    together = (
        len(xs) > 1
        and on_cuda(gram)
        and not is_traced(gram, *xs, *masks)
        and len({x.dtype for x in xs}) == 1
        and backend_of("gram", xs[0]) == "native"
        and gram.stride(1) == 1
        and gram.stride(0) >= gram.shape[0]
    )
    if together:
        _native(gram, xs, masks)
        mark_written(gram)
    else:
        for x, mask in zip(xs, masks, strict=True):
            gram_accumulate_(gram, x, mask)
    return gram


def _native(gram: Tensor, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    tokens = [unit_stride(x.detach().reshape(-1, x.shape[-1])) for x in xs]
    flat = [None if mask is None else mask.reshape(-1).contiguous() for mask in masks]
    samples = [
        (x.data_ptr(), DTYPE_TAGS[x.dtype], *x.shape, row_stride(x), 0 if mask is None else mask.data_ptr())
        for x, mask in zip(tokens, flat, strict=True)
    ]
    kernel = gram_kernel()
    scratch = workspace(_C.cuda.gram_list_workspace_bytes(samples, kernel), gram)
    with device_of(gram):
        target = gram.data_ptr(), row_stride(gram), scratch.data_ptr(), stream_of(gram)
        _C.cuda.gram_accumulate_list(samples, *target, kernel)
