"""The routing weights of the forward that is running: worked out once per prompt, kept while it is decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Prompt:
    """What the text of a batch is routed by.

    Attributes:
        input_ids: int64 ``[b, tokens]``.
        counted: bool ``[b, tokens]``: tokens of the prompt, without padding and image placeholders.
        image_tokens: int64 ``[b]``, placeholders of images in each row.
        image_length: placeholders of one image where the model's configuration says so, else None.
    """

    input_ids: Tensor
    counted: Tensor
    image_tokens: Tensor
    image_length: int | None = None

    @property
    def image_count(self) -> int | None:
        """Images that the placeholders stand for, None where that is not known."""
        count, rest = divmod(int(self.image_tokens.sum()), self.image_length or 1)
        return None if self.image_length is None or rest else count

    def every(self, step: int) -> Prompt:
        """Every `step`-th row."""
        return Prompt(self.input_ids[::step], self.counted[::step], self.image_tokens[::step], self.image_length)

    def is_repeated(self, times: int) -> bool:
        """Whether each row stands there `times` times in succession."""
        if self.input_ids.shape[0] % times:
            return False
        return torch.equal(self.input_ids[::times].repeat_interleave(times, 0), self.input_ids)

    def images_per_row(self, images: int) -> Tensor:
        """How many of `images` images belong to each row, ``[b]``. ValueError if placeholders and images do not fit."""
        total = int(self.image_tokens.sum())
        if images == 0:
            if total:
                raise ValueError(
                    f"pixel_values: expected images for {total} image tokens, got none that went through the vision "
                    "tower; give the weights with `routed(weights)` if the features come from elsewhere"
                )
            return torch.zeros_like(self.image_tokens)
        if total == 0 or total % images:
            raise ValueError(f"pixel_values: expected images of equal length for {total} image tokens, got {images}")
        length = total // images
        if bool((self.image_tokens % length).any()):
            raise ValueError(
                f"input_ids: expected a multiple of {length} image tokens in each row for {images} images, got "
                f"{self.image_tokens.tolist()}"
            )
        return self.image_tokens // length


def image_rows(features: Tensor, images_per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature of each row's images ``[b, d]`` (zero without any), and which rows have one ``[b]``."""
    counts = images_per_row.to(features.device)
    rows = torch.repeat_interleave(torch.arange(len(counts), device=features.device), counts)
    sums = torch.zeros(len(counts), features.shape[1], dtype=features.dtype, device=features.device)
    sums.index_add_(0, rows, features)
    return sums / counts.clamp(min=1)[:, None].to(features.dtype), counts > 0


@dataclass
class _Frame:
    """What one thread is running: prompts, the features of their images so far, and their weights once they are known.

    `repeats`: how often the forward sees each image for once that it sees each prompt. `generating`: whether the
    prompts outlast single forwards.
    """

    prompt: Prompt | None = None
    images: list[Tensor] = field(default_factory=list)
    weights: Tensor | None = None
    repeats: int = 1
    generating: bool = False


class RoutingState:
    """Shared by the layers that route.

    ``router(prompt, image_features)`` gives weights ``[b, tasks]``; it is called at most once per prompt, when the
    first layer asks: by then the vision tower has run, so nothing is computed twice.

    Several threads may run the model at once: each has its own prompts. Only weights that were given hold for all. A
    thread that began no forward, such as the one in which autograd recomputes a checkpointed layer, sees the prompts
    of the forward that began last. A copy, or what is pickled, starts anew: without prompts and without caches.
    """

    def __init__(self, router: Callable[[Prompt, Tensor | None], Tensor]) -> None:
        self.__setstate__({"_router": router, "_fixed": None})

    def __getstate__(self) -> dict[str, Any]:
        return {"_router": self._router, "_fixed": self._fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._router: Callable[[Prompt, Tensor | None], Tensor] = state["_router"]
        self._fixed: Tensor | None = state["_fixed"]
        self._of_thread = threading.local()
        self._latest = _Frame()
        self._of_cache: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        # By the identity of tensors, because two runs of the vision tower may be under way.
        self._of_encoded = WeakIdKeyDictionary()

    @property
    def is_generating(self) -> bool:
        """Whether the prompts outlast single forwards."""
        return self._own.generating

    @property
    def is_fixed(self) -> bool:
        """Whether weights were given, so that prompts need not be routed."""
        return self._fixed is not None

    def begin(self, prompt: Prompt | None, encoded: Tensor | None = None) -> None:
        """A forward of new prompts starts.

        Args:
            prompt: of its rows, None without ids.
            encoded: the vision tower's last hidden state, if the images went through it before.
        """
        found = None if encoded is None else self._of_encoded.get(encoded)
        self._enter(_Frame(prompt, [] if found is None else [found]))

    def expect_repeated_images(self, rows: int) -> None:
        """Within `generating`: a forward of `rows` rows will see each image as often as it sees each prompt."""
        frame = self._own
        if frame.prompt is not None and not frame.images:
            frame.repeats = max(1, rows // max(1, frame.prompt.input_ids.shape[0]))

    def continue_with(self, cache: Any) -> None:
        """A forward goes on from this cache: its prompts' weights hold. ValueError if they are not known."""
        weights = self._of_cache.get(cache)
        if weights is None:
            raise ValueError(
                "past_key_values: expected a cache that this model filled, so that the routing of its prompts is "
                "known, got another; give the weights with `routed(weights)`"
            )
        self._enter(_Frame(weights=weights))

    def remember(self, cache: Any) -> None:
        """The weights of these prompts belong to that cache."""
        weights = self._frame.weights if self._fixed is None else self._fixed
        if weights is not None:
            self._of_cache[cache] = weights

    def add_images(self, features: Tensor, encoded: Tensor) -> None:
        """Features ``[images, d]`` that the vision tower has given, with its last hidden state."""
        self._frame.images.append(features)
        self._of_encoded[encoded] = features

    @contextmanager
    def generating(self, prompt: Prompt | None) -> Iterator[None]:
        """Within the context every forward of this thread is of these prompts, each once or repeated (for beams)."""
        before = self._own
        self._enter(_Frame(prompt, generating=True))
        try:
            yield
        finally:
            self._enter(before)

    @contextmanager
    def fixed(self, weights: Tensor) -> Iterator[None]:
        """Within the context these weights ``[b or 1, tasks]`` hold, whatever the prompts, in all threads."""
        before, self._fixed = self._fixed, weights
        try:
            yield
        finally:
            self._fixed = before

    def resolve(self) -> Tensor:
        """The weights ``[b, tasks]`` of the current prompts. ValueError if there are none."""
        fixed, frame = self._fixed, self._frame
        if fixed is not None:
            return fixed
        if frame.weights is None:
            if frame.prompt is None:
                raise ValueError(
                    "routing: expected a forward of the whole model with input_ids, or weights given with "
                    "`routed(weights)`, got neither"
                )
            images = torch.cat(frame.images)[:: frame.repeats] if frame.images else None
            frame.weights = self._router(frame.prompt, images)
        return frame.weights

    def weights_for(self, rows: int) -> Tensor:
        """The weights of each row of the batch that a layer sees, ``[rows, tasks]``."""
        weights = self.resolve()
        if weights.shape[0] == rows:
            return weights
        if self.is_fixed and weights.shape[0] == 1:
            return weights.expand(rows, -1)
        # generate repeats each prompt for its beams or sequences, side by side, before the first forward.
        if (self._frame.generating or self.is_fixed) and weights.shape[0] and rows % weights.shape[0] == 0:
            return weights.repeat_interleave(rows // weights.shape[0], 0)
        raise ValueError(f"routing: expected a batch of {weights.shape[0]} rows, as routed, got {rows}")

    def weights_of_images(self, images: int) -> Tensor:
        """The weights of each image's sample, ``[images, tasks]``."""
        weights, frame = self.resolve(), self._frame
        if self.is_fixed and weights.shape[0] == 1:
            return weights.expand(images, -1)
        if frame.prompt is None:
            raise ValueError("routing: expected input_ids with the images, got images alone")
        counts = frame.prompt.images_per_row(images // frame.repeats).to(weights.device)
        if weights.shape[0] not in (1, len(counts)):
            raise ValueError(f"routing: expected weights of {len(counts)} rows, got {weights.shape[0]}")
        of_images = weights.expand(len(counts), -1).repeat_interleave(counts, 0)
        return of_images.repeat_interleave(frame.repeats, 0)

    @property
    def _own(self) -> _Frame:
        """What this thread has begun; empty if nothing."""
        return getattr(self._of_thread, "frame", None) or _Frame()

    @property
    def _frame(self) -> _Frame:
        """What this thread has begun, or if nothing what any thread has begun last."""
        return getattr(self._of_thread, "frame", None) or self._latest

    def _enter(self, frame: _Frame) -> None:
        self._of_thread.frame = self._latest = frame
