"""What several tests need: data, memory layouts, sentinels, and how far from exact a result may be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hpa_ext import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights and activations that the native kernels take."""

MATRIX_LAYOUTS = (
    "transposed",
    "padded_rows",
    "every_other_row",
    "sliced_columns",
    "every_other_column",
    "offset",
)

# Never a NaN of arithmetic, so that a NaN that a kernel computes and writes is told apart from an untouched one.
_SENTINEL_BYTE = 0xA5
_GUARD_BYTES = 1024


def is_native(operation: str, device: torch.device | str = "cpu") -> bool:
    """Whether the native kernel serves `operation` for float32 tensors here."""
    return ops.backend_of(operation, torch.empty(0, device=device)) == "native"


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def integers(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Integers from -4 to 4: their products and sums are exact, so results can be compared for equality."""
    return torch.randint(-4, 5, shape).to(dtype).to(device)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that -0 differs from 0 and NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and bits."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    differing = int((bits(actual) != bits(expected)).sum())
    assert differing == 0, f"{differing} of {actual.numel()} elements differ in their bits"


def assert_accurate(
    ours: Tensor, exact: Tensor, of_torch: Tensor, *, scale: Tensor | None = None, roundings: float = 4
) -> None:
    """`ours` lies no further from `exact` than twice as far as torch's result of the same precision.

    Args:
        ours: the result under test.
        exact: the result in float64.
        of_torch: what torch gets in the same precision.
        scale: what errors are relative to; the largest magnitude in `exact` if None.
        roundings: allowed besides, in units of the rounding of our dtype, for results on which torch was lucky.
    """
    assert ours.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    scale = exact.abs().max().expand_as(exact) if scale is None else scale.to(torch.float64)
    # Where the scale is zero, only zero is right.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((ours.double() - exact).abs() / scale).max())
    torch_error = float(((of_torch.double() - exact).abs() / scale).max())
    allowed = 2 * torch_error + roundings * torch.finfo(ours.dtype).eps / 2
    assert error <= allowed, f"relative error {error:.3g}, torch's {torch_error:.3g}, allowed {allowed:.3g}"


def lay_out(values: Tensor, layout: str) -> Tensor:
    """`values` [..., rows, columns] as a view of this layout into a buffer filled with sentinels."""
    *lead, rows, columns = values.shape
    if layout == "contiguous":
        view = sentinels(*values.shape, like=values)
    elif layout == "transposed":
        view = sentinels(*lead, columns, rows, like=values).mT
    elif layout == "padded_rows":
        view = sentinels(*lead, rows, columns + 3, like=values)[..., :columns]
    elif layout == "every_other_row":
        view = sentinels(*lead, 2 * rows, columns, like=values)[..., ::2, :]
    elif layout == "sliced_columns":
        view = sentinels(*lead, rows, columns + 5, like=values)[..., 5:]
    elif layout == "every_other_column":
        view = sentinels(*lead, rows, 2 * columns, like=values)[..., ::2]
    elif layout == "offset":
        view = sentinels(values.numel() + 2, like=values)[1:-1].view(values.shape)
    else:
        raise ValueError(f"layout: got {layout!r}")
    return view.copy_(values)


def at_offset(values: Tensor, offset: int, fill: float | None = None) -> Tensor:
    """`values` [rows, columns] as a view that starts `offset` elements into a sentinel-filled buffer, rows apart.

    `fill` replaces the sentinels: -0 also shows that 0 was added to it, which NaN does not.
    """
    rows, columns = values.shape
    buffer = sentinels(offset + rows * (columns + 3) + 16, like=values)
    if fill is not None:
        buffer.fill_(fill)
    return buffer.as_strided((rows, columns), (columns + 3, 1), offset).copy_(values)


def sentinels(*shape: int, like: Tensor) -> Tensor:
    """A tensor whose every element is out of place: NaN, or True, or a large integer."""
    fill = torch.nan if like.is_floating_point() else True if like.dtype == torch.bool else 10**9
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)


def outside(view: Tensor) -> Tensor:
    """A copy of what lies in the view's storage and does not belong to the view."""
    storage = view.detach().untyped_storage()
    flat = torch.empty(0, dtype=view.dtype, device=view.device).set_(storage)
    inside = torch.zeros(flat.shape, dtype=torch.bool, device=view.device)
    inside.as_strided(view.shape, view.stride(), view.storage_offset())[...] = True
    return flat[~inside]


class GuardedAllocations:
    """Puts what the operations allocate, workspaces included, between guards, and looks at the guards afterwards.

    What is allocated holds sentinels too, so a result that a kernel forgets to write shows.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        monkeypatch.setattr(torch, "empty", self._empty)

    def _empty(self, *size, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        shape = torch.Size(size if not size or isinstance(size[0], int) else size[0])
        dtype = dtype or torch.float32
        length = shape.numel() * dtype.itemsize
        buffer = torch.full((length + 2 * _GUARD_BYTES,), _SENTINEL_BYTE, dtype=torch.uint8, device=device)
        self.buffers.append(buffer)
        return buffer[_GUARD_BYTES : _GUARD_BYTES + length].view(dtype).view(shape)

    def check(self) -> None:
        """Every guard is as it was, and there was something to guard."""
        assert self.buffers, "nothing was allocated through torch.empty"
        for buffer in self.buffers:
            assert bool((buffer[:_GUARD_BYTES] == _SENTINEL_BYTE).all()), "written before the start of an allocation"
            assert bool((buffer[-_GUARD_BYTES:] == _SENTINEL_BYTE).all()), "written past the end of an allocation"


@contextmanager
def refuses(exception: type[Exception], name: str) -> Iterator[None]:
    """The call raises `exception`, saying of the argument `name` what was expected and what came."""
    with pytest.raises(exception, match=rf"^{re.escape(name)}: expected .+, got .+"):
        yield
