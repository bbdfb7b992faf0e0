"""Grams of a running model: hooks on its linears, filled by calibration batches."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import decoder_name, in_module, uncompiled, unwrap
from hpa_ext.token_masks import TokenMask, check_mask, resolve


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    modules: str | Iterable[str] | None = None,
    token_mask: TokenMask | None = "attended",
    progress: bool = True,
) -> GramCollection:
    """Run the batches through the model and accumulate the Gram of every linear's input.

    Args:
        model: a transformers model, a PeftModel around one, or any ``nn.Module``. Runs in evaluation mode without
            gradients or a cache; its mode is restored.
        batches: an iterable of model inputs, such as a DataLoader: mappings (processor output; `labels` are used for
            the token mask and not given to the model), tensors or tuples (positional arguments). Moved to the model's
            device.
        modules: a regular expression that must match a whole module name, or names; None for every linear of the
            language model's decoder.
        token_mask: which tokens count. "attended" (default: no padding), "all", "prompt" (attended, without label),
            "image" (positions of image features), "response" (attended, with label), or a function of the batch that
            returns bool ``[batch, tokens]``. Outside the decoder and the output head (a vision tower) every row counts.
        progress: show a bar when stderr is a terminal.

    Returns:
        ``{module name: Gram}`` in the model's order, keyed by the name in the plain transformers model. Linears that
        receive the same tensor (q/k/v; gate/up) share one Gram object; `GramCollection.merge_` and `all_reduce_` count
        it once. The Grams are where the activations were.

    Raises:
        TypeError, ValueError: no batch; a batch or mask does not fit; nothing matches `modules`.
        NumericalError: an activation is not finite; `module` names where.

    Hooks are removed whatever happens.
    """
    select_tokens = resolve(token_mask)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping, Tensor)):
        raise TypeError(
            f"batches: expected an iterable of batches (for one, a list of it), got {type(batches).__name__}"
        )
    linears = find_linears(model, modules)
    plain, model = unwrap(model), uncompiled(model)
    head = _head(plain, linears)
    collector = _Collector(linears, decoder_name(plain), head)
    forward_options = _forward_options(plain, all_logits=bool(head))
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    count = 0
    # Tensors of inference mode have no version, by which a change in place is seen.
    with _evaluating(model), collector.hooked(), torch.inference_mode(False), torch.no_grad():
        for batch in tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=None if progress else True):
            arguments, keywords = _inputs(batch, device)
            mask = check_mask(select_tokens(keywords, plain)) if keywords else _mask_without_names(token_mask)
            keywords.pop("labels", None)
            with collector.listening(mask):
                model(*arguments, **{**keywords, **forward_options})
            count += 1
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    return collector.grams()


class _Collector:
    """Groups linears by the tensor they receive, and feeds one Gram a group."""

    def __init__(self, linears: dict[str, Linear], decoder: str, head: set[str]) -> None:
        self._linears = linears
        self._masked = {name for name in linears if in_module(name, decoder)} | head
        self._listening = False
        self._leader_of: dict[str, str] = {}
        self._grams: dict[str, Gram] = {}
        self._mask: Tensor | None = None
        # Inputs of this forward that are still alive, by identity. Weak, so that activations are freed as ever.
        self._seen: dict[int, tuple[weakref.ref, int, str]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, linear in self._linears.items():
                hook = lambda module, args, kwargs, name=name: self._receive(name, args, kwargs)  # noqa: E731
                handles.append(linear.module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def listening(self, mask: Tensor | None) -> Iterator[None]:
        """Only within the context do calls count: the iterable of batches or the mask may run the model as well."""
        self._mask = mask
        self._seen.clear()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            self._seen.clear()
        self._check_devices()

    def _check_devices(self) -> None:
        """Look at the Grams on devices, once a batch; those on the CPU have looked themselves."""
        for name, gram in self._grams.items():
            if gram.device.type == "cpu":
                continue
            try:
                gram.check_finite()
            except NumericalError as error:
                raise error.in_module(name) from error

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

    def _receive(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
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


def _inputs(batch: Any, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a batch, tensors on the model's device."""
    if isinstance(batch, Mapping):
        return (), {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, Tensor) for value in batch):
        return tuple(value.to(device) for value in batch), {}
    raise TypeError(f"batches: expected mappings, tensors or tuples of tensors, got {type(batch).__name__}")


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _mask_without_names(token_mask: TokenMask | None) -> None:
    """A batch of positional arguments has no attention_mask or labels to make a mask from."""
    if token_mask not in (None, "all", "attended"):
        raise ValueError(f"token_mask: {token_mask!r} needs batches that are mappings with names")


def _head(model: nn.Module, linears: dict[str, Linear]) -> set[str]:
    """The names of the linears that are the model's output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = set() if head is None else {id(module) for module in head.modules()}
    return {name for name, linear in linears.items() if id(linear.module) in inside}


def _forward_options(model: nn.Module, all_logits: bool) -> dict[str, Any]:
    """No cache, which would grow at every batch, and logits of one position only, where the model takes these.

    The output head needs all positions if it is calibrated itself.
    """
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 0 if all_logits else 1}
    return {key: value for key, value in options.items() if key in accepted}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
