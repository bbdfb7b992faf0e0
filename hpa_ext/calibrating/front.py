"""What comes before the decoder's first layer, run once: the hidden states, and what each layer is called with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.files import tensor_bytes

_PLAIN = (type(None), bool, int, float, str)


class LayerCalls:
    """The arguments besides the hidden states that each layer of each batch is called with, equal tensors kept once."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._calls: dict[tuple[int, int], tuple[tuple, dict[str, Any]]] = {}

    def keep(self, batch: int, calls: dict[int, tuple[tuple, dict[str, Any]]]) -> None:
        """Remember the calls of all layers. ValueError for a value that a later call could not be given again."""
        known: dict[int, Tensor] = {}
        for layer, (arguments, keywords) in calls.items():
            kept = {key: self._kept(value, known) for key, value in keywords.items()}
            self._calls[batch, layer] = self._kept(arguments, known), kept

    def get(self, batch: int, layer: int, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments, tensors on the device."""
        return _on(self._calls[batch, layer], device)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _kept(self, value: Any, known: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                tensor = value.detach().cpu().contiguous()
                digest = hashlib.blake2b(tensor_bytes(tensor), digest_size=16).digest() if tensor.numel() else b""
                known[id(value)] = self._tensors.setdefault((tensor.dtype, tuple(tensor.shape), digest), tensor)
            return known[id(value)]
        if isinstance(value, _PLAIN):
            return value
        if type(value) in (tuple, list):
            return type(value)(self._kept(item, known) for item in value)
        raise ValueError(f"the layers are called with a {type(value).__name__}, which cannot be kept between layers")


class _FrontDone(Exception):
    """Ends a forward before the work that comes after the decoder's layers."""


class Front:
    """Runs a model without its decoder layers.

    Each layer is replaced by one that notes what it is called with and returns the hidden states as they are; the
    decoder must hand them on from layer to layer untouched, for only then do layers in a row equal the model.

    Args:
        model: the model, everything before the decoder's layers loaded.
        layers: the decoder's layers; their parameters are not used.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self.calls = LayerCalls()
        self._model = model
        self._layers = layers
        self._returns_tuple = False

    def run(self, batch: int, arguments: tuple, keywords: dict[str, Any]) -> Tensor:
        """The hidden states ``[batch, tokens, width]`` that enter the first layer, for the batch of this number.

        Raises:
            ValueError: the decoder changes the hidden states between its layers, or calls them with what cannot be
                kept; the message says to use the whole model.
        """
        reasons = []
        for returns_tuple in (self._returns_tuple, not self._returns_tuple):
            passage = _Passage(len(self._layers), returns_tuple)
            try:
                with passage.through(self._layers):
                    self._model(*arguments, **keywords)
                reasons.append("not every layer was called")
            except _FrontDone:
                try:
                    self.calls.keep(batch, passage.calls)
                except ValueError as error:
                    raise _refusal(self._model, str(error)) from error
                self._returns_tuple = returns_tuple
                return passage.entering
            except _Touched as error:
                reasons.append(str(error))
            except (TypeError, ValueError, IndexError) as error:
                if not passage.calls:
                    raise  # before the decoder: the batch itself does not fit
                reasons.append(str(error))
        raise _refusal(self._model, "; if layers return a tuple: ".join(reasons))


class _Touched(Exception):
    """The decoder did something to the hidden states between two layers."""


class _Passage:
    """One forward through the replaced layers."""

    def __init__(self, count: int, returns_tuple: bool) -> None:
        self.calls: dict[int, tuple[tuple, dict[str, Any]]] = {}
        self.entering: Tensor
        self._count = count
        self._returns_tuple = returns_tuple
        self._version = 0

    @contextmanager
    def through(self, layers: nn.ModuleList) -> Iterator[None]:
        # On the instance: the modules stay, and with them what decoders ask their layers for.
        for index, layer in enumerate(layers):
            layer.forward = lambda *args, index=index, **kwargs: self._receive(index, args, kwargs)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _receive(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        if index != len(self.calls):
            raise _Touched(f"layer {index} is called after {len(self.calls)} layers")
        if index == 0:
            self.entering, self._version = hidden, hidden._version
        elif hidden is not self.entering or hidden._version != self._version:
            raise _Touched(f"the hidden states are changed between layers {index - 1} and {index}")
        self.calls[index] = args, kwargs
        if index == self._count - 1:
            raise _FrontDone
        return (hidden,) if self._returns_tuple else hidden


def split_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The hidden states of a call of a layer, and its other arguments."""
    if args:
        hidden, args = args[0], args[1:]
    else:
        kwargs = dict(kwargs)
        hidden = kwargs.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise _Touched(f"a layer is called without hidden states, with {type(hidden).__name__}")
    return hidden, args, kwargs


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"mode: {type(model).__name__} cannot be calibrated layer by layer ({reason}); use mode='whole'")


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_on(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return value
