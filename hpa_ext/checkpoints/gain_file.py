"""The column gain of a harmonized adapter, in a file beside PEFT's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.models.key_names import KeyNames
from hpa_ext.models.layer_sizes import layer_sizes

GAIN_FILE = "hpa_gain.safetensors"
GAIN_MARK = "hpa_gain_sha256"
"""In the header of ``adapter_model.safetensors``: which gain file belongs to it. PEFT looks over it."""


def gain_bytes(gain: Mapping[str, Tensor]) -> bytes:
    """The contents of a gain file: float32 ``[in]`` by canonical module name. The same bytes for the same gain."""
    import safetensors.torch

    tensors = {name: gain[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(gain)}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def sha256_of(contents: bytes) -> str:
    """SHA-256 in hexadecimal digits, as `GAIN_MARK` holds it."""
    return hashlib.sha256(contents).hexdigest()


def read_gain(path: Path, expected_sha256: str | None, model: nn.Module) -> dict[str, Tensor]:
    """The gain by canonical module name of `model`, checked against its modules.

    Args:
        path: the file.
        expected_sha256: what the adapter beside it says, None if it says nothing.
        model: the model, or its `skeleton`.

    Raises:
        CheckpointError: another file than the adapter names, a module that the model lacks, a wrong shape or dtype, or
            a value that is not finite.
    """
    if expected_sha256 is None:
        raise CheckpointError(
            f"{path}: adapter_model.safetensors beside it says nothing of a gain: it is not the one that this file was "
            "written with"
        )
    if sha256_of(path.read_bytes()) != expected_sha256:
        raise CheckpointError(
            f"{path}: not the file that adapter_model.safetensors beside it was written with (SHA-256 differs)"
        )
    modules = dict(model.named_modules())
    names = KeyNames(model, extra=[f"{name}.weight" for name in modules])
    gain: dict[str, Tensor] = {}
    with CheckpointReader(path) as reader:
        for name, entry in reader.entries.items():
            found = (names.canonical(f"{name}.weight") or "").removesuffix(".weight")
            sizes = layer_sizes(modules[found]) if found in modules else None
            if sizes is None:
                tried = ", ".join(names.tried(f"{name}.weight"))
                raise CheckpointError(f"{path}: {name!r} is no layer of {names.model_class}; tried {tried}")
            if entry.dtype != torch.float32 or entry.shape != (sizes.in_features,):
                raise CheckpointError(
                    f"{path}: {name}: expected F32 [{sizes.in_features}], got {entry.dtype_tag} {list(entry.shape)}"
                )
            if found in gain:
                raise CheckpointError(f"{path}: two entries belong to {found}, the second is {name!r}")
            gain[found] = reader.read(name)
            if not bool(torch.isfinite(gain[found]).all()):
                raise CheckpointError(f"{path}: {name}: holds NaN or Inf")
    return gain
