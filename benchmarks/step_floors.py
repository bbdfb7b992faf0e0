"""The least time that a step's phases can take on a device: operations over its GEMM, bytes over its bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

from .ceilings import Ceilings
from .step_clock import PHASES
from .step_model import StepShape
from .step_ours import ReducedGram

_BYTES = 2  # of a bfloat16


def layer_floors_ms(shape: StepShape, reduced: Sequence[ReducedGram], ceilings: Ceilings) -> list[list[float]]:
    """Milliseconds by decoder layer and by phase (of `PHASES`).

    forward: two operations for each element of the linears and token, and the causal half of attention's products,
    over the bfloat16 GEMM; the vision tower, embeddings and norms count as nothing. Gram: ``d (d + 1)`` operations a
    token for each distinct input, one triangle, over the same. inverse diagonals: ``2/3 d^3`` over the float32 GEMM.
    scores: both weights over the read bandwidth. merge: two weights read and one written, over the copy bandwidth.
    selection: nothing.

    A Gram that kept its n rows (`ReducedGram.from_rows`) has copying them as the floor of its Gram, and that of its
    inverse is ``n^2 d`` over the bfloat16 GEMM and ``n^3/3 + n^2 d`` over the float32 one.

    Args:
        reduced: what was reduced; those of no known layer are left out.
    """
    every = {"forward": _forward_ms(shape, ceilings)}
    weights = shape.layer_parameters * _BYTES
    every["scores"] = 2 * weights / ceilings.read_gb_s / 1e6
    every["merge"] = 3 * weights / ceilings.copy_gb_s / 1e6
    floors = [[every.get(phase, 0.0) for phase in PHASES] for _ in range(shape.layers)]
    gram, inverse = PHASES.index("Gram"), PHASES.index("inverse diagonals")
    for one in reduced:
        if one.layer is not None:
            floors[one.layer][gram] += _gram_ms(one, ceilings)
            floors[one.layer][inverse] += _inverse_ms(one, ceilings)
    return floors


def operations(shape: StepShape) -> float:
    """Multiplications and additions of the whole step, by the forms that a GPU takes."""
    tokens = [samples * shape.tokens for samples in shape.samples]
    grams = sum(width * (width + 1) for width in shape.gram_widths) * sum(tokens)
    inverses = sum(2 / 3 * width**3 for width in shape.gram_widths) * len(tokens)
    return shape.layers * (_forward_operations(shape) + grams + inverses)


def _forward_operations(shape: StepShape) -> float:
    samples = sum(shape.samples)
    linears = 2 * shape.layer_parameters * samples * shape.tokens
    attention = 2 * samples * shape.tokens**2 * shape.width
    return linears + attention


def _forward_ms(shape: StepShape, ceilings: Ceilings) -> float:
    return _forward_operations(shape) / ceilings.bfloat16_tflop_s / 1e9


def _gram_ms(one: ReducedGram, ceilings: Ceilings) -> float:
    if one.from_rows:
        return 2 * one.tokens * one.width * _BYTES / ceilings.copy_gb_s / 1e6
    return one.tokens * one.width * (one.width + 1) / ceilings.bfloat16_tflop_s / 1e9


def _inverse_ms(one: ReducedGram, ceilings: Ceilings) -> float:
    if not one.from_rows:
        return 2 / 3 * one.width**3 / ceilings.float32_tflop_s / 1e9
    products = one.tokens**2 * one.width
    return products / ceilings.bfloat16_tflop_s / 1e9 + (one.tokens**3 / 3 + products) / ceilings.float32_tflop_s / 1e9
