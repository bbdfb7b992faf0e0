"""routed_lora, added in place to what the base layer has given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpa_ext.ops._backend import backend_of, is_traced, mark_written
from hpa_ext.ops._library import register
from hpa_ext.ops._routed_lora_checks import check_linears
from hpa_ext.ops.routed_lora_list import launch, routed_lora_of


def routed_lora_add_(onto: Tensor, x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """``onto += routed_lora(x, a, b, weights, scaling)``, in place and without the branch in memory.

    Args:
        onto: ``[batch, tokens, out]`` of the dtype of `x`; may share memory with the other arguments.
        x, a, b, weights, scaling: as in `routed_lora`.

    Returns:
        `onto`: bit for bit ``onto + routed_lora(...)``; the branch is rounded to the dtype before it is added.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device of an argument. `onto` is then unchanged.
        RuntimeError: gradients are wanted: use ``routed_lora_list(..., onto=[onto])``, which is differentiable.
    """
    tensors: tuple[Any, ...] = (onto, x, a, b, weights, scaling)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            "routed_lora_add_: expected no argument that requires grad, or torch.no_grad(); "
            "routed_lora_list(..., onto=[onto]) is differentiable"
        )
    if is_traced(*tensors):
        torch.ops.hpa_ext.routed_lora_add_(*(t.detach() for t in tensors))
    else:
        _routed_lora_add_(*tensors)
    return onto


def _check(onto: Tensor, x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> None:
    check_linears(x, [a], [b], weights, [scaling], [onto], "onto")


def _routed_lora_add_(onto: Tensor, x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> None:
    _check(onto, x, a, b, weights, scaling)
    # The kernels have read x and A before they write; the rest they may still read.
    apart = onto.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (b, weights, scaling)}
    if backend_of("routed_lora", x) == "native" and onto.is_contiguous() and apart:
        target = onto.detach()
        launch(x, [a], [b], weights, [scaling], [target], [target])
        mark_written(onto)
    else:
        with torch.no_grad():
            onto.copy_(routed_lora_of(x, [a], [b], weights, [scaling], [onto])[0])


register(
    "routed_lora_add_(Tensor(a!) onto, Tensor x, Tensor a, Tensor b, Tensor weights, Tensor scaling) -> ()",
    _routed_lora_add_,
    _check,
)
