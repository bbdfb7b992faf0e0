"""routed_lora: several LoRA experts on one input, weighted for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.ops._library import LIBRARY
from hpa_ext.ops.routed_lora_list import routed_lora_of


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

    Both products accumulate in float32, and what lies between them stays float32. Differentiable in x, a, b, weights
    and scaling, twice too; the gradients accumulate in float32. bfloat16 subnormals may count as zero.
    `routed_lora_list` takes several linears with one input. HiDe (ACL 2025), equation of the top layer.
    """
    return routed_lora_of(x, [a], [b], weights, [scaling], [])[0]


def _operator(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    return torch.ops.hpa_ext.routed_lora_list(x, [a], [b], weights, [scaling], [])[0]


# The list of one, for the dispatcher too: its gradients and its fake are those of routed_lora_list.
LIBRARY.define("routed_lora(Tensor x, Tensor a, Tensor b, Tensor weights, Tensor scaling) -> Tensor")
LIBRARY.impl("routed_lora", _operator, "CompositeImplicitAutograd")
