"""Hooks on linears that feed their inputs to Grams, one Gram for linears that receive the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection
from hpa_ext.models.linear import Linear
from hpa_ext.models.structure import in_module


class GramCollector:
    """Groups linears by the tensor they receive, and feeds one Gram a group."""

    def __init__(self, linears: dict[str, Linear], decoder: str, head: set[str]) -> None:
        self._linears = linears
        self._masked = {name for name in linears if in_module(name, decoder)} | head
        self._listening = False
        self._leader_of: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}
        self._mask: Tensor | None = None
        self._failure: Exception | None = None
        # Inputs of this forward that are still alive, by identity. Weak, so that activations are freed as ever.
        self._seen: dict[int, tuple[weakref.ref, int, str]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, linear in self._linears.items():
                hook = lambda module, args, kwargs, name=name: self._hook(name, args, kwargs)  # noqa: E731
                handles.append(linear.module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def listening(self, mask: Tensor | None) -> Iterator[None]:
        """Only within the context do calls count: the iterable of batches or the mask may run the model as well.

        What is wrong with an input is raised at the end of the context.
        """
        with self.noting(mask):
            yield
        self.check()

    @contextmanager
    def noting(self, mask: Tensor | None) -> Iterator[None]:
        """As `listening`, but `check` raises what is wrong.

        The forward itself runs to its end, because the other processes of a sharded model take part in it.
        """
        self._mask = mask
        self._seen.clear()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            self._seen.clear()

    def check(self) -> None:
        """Raise what the last forward did wrong. Looks at the Grams on devices; those on the CPU looked themselves."""
        if self._failure is not None:
            raise self._failure
        for name, gram in self._grams.items():
            if gram.device.type == "cpu":
                continue
            try:
                gram.check_finite()
            except NumericalError as error:
                raise error.in_module(name) from error

    def leaders(self) -> dict[str, str | None]:
        """For each linear the first one that shares its input; None while no batch has reached it."""
        return {name: self._leader_of.get(name) for name in self._linears}

    def grams(self) -> GramCollection:
        """By name; a linear that no batch reached has an empty Gram of its own."""
        result = GramCollection()
        for name, linear in self._linears.items():
            leader = self._leader_of.get(name)
            if leader is None:
                weight = linear.base_weight()
                result[name] = Gram(weight.shape[1], device=weight.device)
            else:
                result[name] = self._grams[leader]
        return result

    def _hook(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
        try:
            self._receive(name, args, kwargs)
        except (TypeError, ValueError, NumericalError) as error:
            self._failure = error
            self._listening = False

    def _receive(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        leader = self._leader(name, x)
        if leader != name:
            return
        if name not in self._grams:
            self._grams[name] = Gram(x.shape[-1], device=x.device)
        try:
            self._grams[name].update(x, self._token_mask(name, x))
        except NumericalError as error:
            raise error.in_module(name) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _leader(self, name: str, x: Tensor) -> str:
        """The first linear of this forward that received the same, unchanged tensor object."""
        # A tensor of inference mode has no version: whether it was changed cannot be told, so none is shared.
        version = None if x.is_inference() else x._version
        seen = self._seen.get(id(x))
        if version is not None and seen is not None and seen[0]() is x and seen[1] == version:
            current = seen[2]
        else:
            current = name
            if version is not None:
                self._seen[id(x)] = (weakref.ref(x), version, name)
        first = self._leader_of.setdefault(name, current)
        if first in (current, name):
            return first
        raise ValueError(
            f"{name}: received the input of {first} in earlier batches, but another tensor in this one; "
            "calibrate these modules in separate calls"
        )

    def _token_mask(self, name: str, x: Tensor) -> Tensor | None:
        mask = self._mask
        if mask is None or name not in self._masked:
            return None
        mask = mask.to(x.device)
        if mask.shape == x.shape[:-1]:
            return mask
        if x.dim() == 2 and x.shape[0] == mask.numel():
            return mask.reshape(-1)
        if [size for size in x.shape[:-1] if size != 1] == [size for size in mask.shape if size != 1]:
            return mask.reshape(x.shape[:-1])  # DeepSeek's latent attention has a dimension of 1 more
        raise ValueError(
            f"token_mask of shape {list(mask.shape)} does not fit its input {list(x.shape)}; "
            'use token_mask="all" or leave the module out'
        )
