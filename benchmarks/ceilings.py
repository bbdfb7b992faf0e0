"""What the device itself can do, measured in the same run: copy and read bandwidth, and the rates of its GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import Call, fastest_ms

_TOO_SLOW_MS = 100.0  # a CPU without fast bfloat16 is not given a larger product


@dataclass(frozen=True)
class Ceilings:
    """The best rates of torch's own copy, sum, inner product and matrix product.

    Attributes:
        copy_gb_s: bytes read plus bytes written, per second, of copying a large buffer.
        read_gb_s: bytes per second of summing a large float32 buffer, or of the inner product of two, whichever is
            faster: the second reads two streams, as a pair of weights is read.
        float32_tflop_s: of a square float32 product (TF32 off).
        bfloat16_tflop_s: of a square bfloat16 product.
    """

    copy_gb_s: float
    read_gb_s: float
    float32_tflop_s: float
    bfloat16_tflop_s: float

    def gemm(self, dtype: torch.dtype) -> tuple[str, float]:
        """Name and TFLOP/s of the GEMM that inputs of `dtype` can be multiplied with."""
        if dtype == torch.float32:
            return "float32 GEMM", self.float32_tflop_s
        return "bfloat16 GEMM", self.bfloat16_tflop_s


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Measure them all; a few seconds on a CPU. `quick` takes small sizes, whose rates mean nothing."""
    copy, copied = copy_probe(device, quick=quick)
    copy_ms = fastest_ms(copy, device)
    values, others = (torch.rand(_buffer_bytes(device, quick) // 4, device=device) for _ in range(2))
    sum_ms = fastest_ms(lambda index: values.sum(), device)
    product_ms = fastest_ms(lambda index: torch.dot(values, others), device)
    read_ms = min(sum_ms, product_ms / 2)
    return Ceilings(
        copy_gb_s=copied / copy_ms / 1e6,
        read_gb_s=values.numel() * 4 / read_ms / 1e6,
        float32_tflop_s=_gemm_tflop_s(device, torch.float32, quick),
        bfloat16_tflop_s=_gemm_tflop_s(device, torch.bfloat16, quick),
    )


def copy_probe(device: torch.device, *, quick: bool = False) -> tuple[Call, int]:
    """A call that copies a buffer too large for any cache, and the bytes it reads plus those it writes."""
    size = _buffer_bytes(device, quick)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return (lambda index: target.copy_(source)), 2 * size


def _buffer_bytes(device: torch.device, quick: bool) -> int:
    if quick:
        return 1 << 20
    return 1 << 30 if device.type == "cuda" else 1 << 28


def _gemm_tflop_s(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """The best rate over growing squares."""
    best = 0.0
    sizes = (128,) if quick else (8192,) if device.type == "cuda" else (512, 1024, 2048)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        milliseconds = fastest_ms(lambda index, a=a, b=b: a @ b, device)
        best = max(best, 2 * size**3 / milliseconds / 1e9)
        if milliseconds > _TOO_SLOW_MS:
            break
    return best
