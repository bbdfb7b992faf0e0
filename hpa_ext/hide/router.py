"""From prompts to routing weights, by a model's features and anchors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpa_ext.hide.routing_state import Prompt, image_rows

if TYPE_CHECKING:
    from hpa_ext.hide.model import HiDeModel


class Router:
    """Asks the model that it belongs to for features, anchors and settings, which may change."""

    def __init__(self, owner: HiDeModel) -> None:
        self._owner = owner

    @torch.no_grad()
    def __call__(self, prompt: Prompt, images: Tensor | None) -> Tensor:
        """The weights ``[b, tasks]``, float32.

        Args:
            prompt: of a batch.
            images: features ``[images, d]`` in the order of the rows, or None.

        Raises:
            ValueError: a prompt has nothing to be routed by, or images and placeholders do not fit.
        """
        repeats = self._repeats(images, prompt)
        if repeats > 1:
            return self(prompt.every(repeats), images).repeat_interleave(repeats, 0)
        owner = self._owner
        config, features = owner.config, owner.features
        text = None
        if features.text is not None and config.text_weight > 0:
            text = features.text(prompt.input_ids, prompt.counted)
        image, has_image = None, None
        if owner.routes_by_images:
            if images is not None:
                image, has_image = image_rows(images, prompt.images_per_row(images.shape[0]))
                image = image.to(prompt.input_ids.device)
                has_image = has_image.to(image.device)
            else:
                prompt.images_per_row(0)  # raises if there should have been some
        if text is None:
            missing = image is None or not bool(has_image.all())
            if missing:
                raise ValueError(
                    "text_weight: a prompt without an image has nothing to be routed by when text has no weight or no "
                    "features; give the weights with `routed(weights)`"
                )
            has_image = None
        return owner.anchors.route(image, text, config, has_image).float()

    @staticmethod
    def _repeats(images: Tensor | None, prompt: Prompt) -> int:
        """How often each prompt stands there beside itself, if the images were encoded before generate repeated it."""
        expected = prompt.image_count
        if images is None or not expected or images.shape[0] == 0 or expected % images.shape[0]:
            return 1
        repeats = expected // images.shape[0]
        return repeats if prompt.is_repeated(repeats) else 1
