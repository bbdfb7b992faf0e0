"""The element types of safetensors: their tags in the header, their bits, and torch's dtypes."""

from __future__ import annotations

import torch

_BITS_AND_NAME = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    # Not in every safetensors that this package runs with.
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "C64": (64, "complex64"),
}

BITS: dict[str, int] = {tag: bits for tag, (bits, _) in _BITS_AND_NAME.items()}
"""Bits of one element by tag."""

SINCE_THE_BEGINNING = frozenset(list(BITS)[: list(BITS).index("F4")])
"""The tags that every supported safetensors knows."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    tag: getattr(torch, name) for tag, (_, name) in _BITS_AND_NAME.items() if name is not None and hasattr(torch, name)
}
"""torch's dtype by tag, where this torch has one."""

TAGS: dict[torch.dtype, str] = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
"""The tag by torch's dtype."""


def elements_per_item(tag: str) -> int:
    """How many elements of the header's shape one item of the torch tensor holds: 2 for F4, two to a byte, else 1."""
    return 2 if tag == "F4" else 1


def dtype_tag(dtype: torch.dtype) -> str:
    """The tag of a torch dtype.

    Raises:
        TypeError: safetensors has none for it.
    """
    if dtype not in TAGS:
        raise TypeError(f"dtype: expected one that safetensors can hold ({', '.join(map(str, TAGS))}), got {dtype}")
    return TAGS[dtype]
