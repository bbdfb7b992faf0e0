"""A checkpoint's model whose parameters come from the disk only when they are needed, and go again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.models.structure import decoder_name


class LoadableModel:
    """The model of a checkpoint, in evaluation mode, its parameters on the meta device until they are loaded.

    Args:
        weights: the checkpoint with its adapters.
        device: where loaded parameters and the buffers go.
        dtype: of floating-point parameters; None for that of the decoder on disk.

    Attributes:
        module: the transformers model.
        dtype: of its activations.
    """

    def __init__(self, weights: CheckpointWeights, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype or _stored_dtype(weights)
        self._weights = weights
        kind, config = type(weights.model), weights.model.config
        with _parameters_on_meta(), _default_dtype(self.dtype):
            self.module: nn.Module = kind(config).eval()
        for owner in self.module.modules():
            for key, buffer in owner.named_buffers(recurse=False):
                owner._buffers[key] = buffer.to(device)
        self._float32 = self._kept_in_float32()

    def load(self, wanted: Callable[[str], bool]) -> None:
        """Read the parameters and stored buffers with these names that are not loaded yet. Tied ones stay tied."""
        stored = set(self.module.state_dict())
        loaded: dict[int, nn.Parameter] = {}
        for name, parameter in list(self.module.named_parameters(remove_duplicate=False)):
            if not wanted(name) or parameter.device.type != "meta":
                continue
            if id(parameter) not in loaded:
                # Kept alive beside its replacement, so that no other object gets its id meanwhile.
                loaded[id(parameter)] = nn.Parameter(self._read(name), requires_grad=False)
        for name, parameter in list(self.module.named_parameters(remove_duplicate=False)):
            if id(parameter) in loaded:
                self._set(name, loaded[id(parameter)])
        for name, _ in list(self.module.named_buffers()):
            if name in stored and wanted(name):
                owner, _, key = name.rpartition(".")
                self.module.get_submodule(owner)._buffers[key] = self._read(name)

    def unload(self, module: nn.Module) -> None:
        """Put the parameters of a part of the model back on the meta device."""
        for owner in module.modules():
            for key, parameter in owner.named_parameters(recurse=False):
                owner._parameters[key] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def prefetch(self, prefix: str) -> None:
        """Ask the system to read the tensors below a name into its cache meanwhile."""
        for name, disk in self._weights.disk_name.items():
            if name.startswith(prefix):
                self._weights.reader.prefetch(disk)

    def nbytes(self, wanted: Callable[[str], bool] = lambda name: True) -> int:
        """Bytes of the parameters with these names once they are loaded."""
        return sum(
            parameter.numel() * self._dtype_of(name, parameter.dtype).itemsize
            for name, parameter in self.module.named_parameters()
            if wanted(name)
        )

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        return tensor.to(device=self.device, dtype=self._dtype_of(name, tensor.dtype))

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if not dtype.is_floating_point:
            return dtype
        return torch.float32 if self._float32.search(name) else self.dtype

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, key = name.rpartition(".")
        self.module.get_submodule(owner)._parameters[key] = parameter

    def _kept_in_float32(self) -> re.Pattern[str]:
        """Names that transformers keeps in float32 when it loads a model of this dtype."""
        parts: list[str] = []
        if self.dtype != torch.float32:
            parts += getattr(self.module, "_keep_in_fp32_modules_strict", None) or []
        if self.dtype == torch.float16:
            parts += getattr(self.module, "_keep_in_fp32_modules", None) or []
        return re.compile("|".join(rf"(?:^|\.){part}(?:\.|$)" for part in parts) if parts else r"(?!)")


def missing_tensors(weights: CheckpointWeights, wanted: Callable[[str], bool]) -> None:
    """Raise CheckpointError if the checkpoint lacks a tensor that will be needed."""
    absent = [name for name in weights.missing if wanted(name)]
    if absent:
        raise CheckpointError(
            f"{weights.reader.path}: lacks {len(absent)} tensors that calibration needs, such as {absent[0]}; "
            "a checkpoint in the layout of the original LLaVA has no vision tower: use the one in transformers' layout"
        )
    converted = [name for name in weights.converted.values() if wanted(name)]
    if converted:
        raise CheckpointError(
            f"{weights.reader.path}: {converted[0]} is stored in parts that transformers joins when it loads the "
            "model; load it with transformers and use hpa_ext.calibrate and hpa_ext.save_grams"
        )


def _stored_dtype(weights: CheckpointWeights) -> torch.dtype:
    """The dtype on disk of the decoder's first matrix, which is that of its linears."""
    decoder = decoder_name(weights.model)
    for name, parameter in weights.model.named_parameters():
        if name.startswith(decoder) and parameter.dim() == 2 and name in weights.disk_name:
            dtype = weights.reader.entry(weights.disk_name[name]).dtype
            if dtype in (torch.float32, torch.float16, torch.bfloat16):
                return dtype
            raise CheckpointError(
                f"{weights.reader.path}: {name} is stored as {dtype}; expected float32, float16 or bfloat16"
            )
    raise CheckpointError(f"{weights.reader.path}: the decoder has no matrix")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the context new modules have their parameters on the meta device, and their buffers as they make them.

    A model that is built under ``torch.device("meta")`` has no values in the buffers that it computes itself, such as
    rotary frequencies, and they are not in the checkpoint either.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prefixes(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a tensor's name is inside one of these modules."""
    starts = tuple(f"{name}." for name in names)
    return lambda name: name.startswith(starts)
