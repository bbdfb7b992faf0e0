"""The argument checks of routed_lora's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpa_ext.ops._checks import WEIGHT_DTYPES, check_same, check_shape, check_tensor


def check_linears(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Tensor,
    scaling: Sequence[Tensor],
    outputs: Sequence[Tensor],
    outputs_name: str,
) -> None:
    """Raise TypeError or ValueError unless these are linears of one input, as `routed_lora_list` takes them.

    `outputs`, named `outputs_name`: tensors like the linears' outputs; empty for none.
    """
    check_tensor("x", x, "[batch, tokens, in]", 3, WEIGHT_DTYPES)
    for name, value in (("b", b), ("scaling", scaling), *([(outputs_name, outputs)] if outputs else [])):
        if len(value) != len(a):
            raise ValueError(f"{name}: expected {len(a)} tensors, one for each of a, got {len(value)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for index in range(len(a)):
        of = f"[{index}]" if len(a) > 1 else ""
        a_, b_, scaling_ = a[index], b[index], scaling[index]
        check_tensor(f"a{of}", a_, "[tasks, rank, in]", 3)
        check_tensor(f"b{of}", b_, "[tasks, out, rank]", 3)
        tasks, rank, out_features = a[0].shape[0], a_.shape[1], b_.shape[1]
        if rank < 1:
            raise ValueError(f"a{of}: expected [tasks, rank, in] with rank at least 1, got rank 0")
        because = f"for x with {x.shape[2]} features" + (f" and {tasks} tasks, as in a[0]" if index else "")
        check_shape(f"a{of}", a_, (tasks, rank, x.shape[2]), because)
        check_shape(f"b{of}", b_, (tasks, out_features, rank), "for a of this many tasks and this rank")
        shapes = (("weights", weights, (x.shape[0], tasks)), (f"scaling{of}", scaling_, (tasks,)))
        for name, value, shape in shapes if index == 0 else shapes[1:]:
            check_tensor(name, value, str(list(shape)), len(shape), (dtype,))
            check_shape(name, value, shape, "for this batch and these tasks")
            check_same(name, value, "x", x, dtype=False)
        check_same(f"a{of}", a_, "x", x)
        check_same(f"b{of}", b_, "x", x)
        if outputs:
            name, value = f"{outputs_name}{of}", outputs[index]
            check_tensor(name, value, "[batch, tokens, out]", 3)
            check_shape(name, value, (x.shape[0], x.shape[1], out_features), "like the output of this linear")
            check_same(name, value, "x", x)
