"""From similarities to routing weights: pure tensors in, tensors out, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.hide.config import HiDeConfig


def cosines(features: Tensor, anchors: Tensor) -> Tensor:
    """Cosine of every row of features ``[b, d]`` with every row of anchors ``[tasks, d]``: ``[b, tasks]`` float64.

    A zero vector has cosine 0 with everything (HiDe, equation 3).
    """
    return _unit(features.double()) @ _unit(anchors.double()).mT


def similarity(
    image: Tensor | None, text: Tensor | None, config: HiDeConfig, has_image: Tensor | None = None
) -> Tensor:
    """``r = alpha * cos_v + beta * cos_ins`` ``[b, tasks]`` (HiDe, equation 4).

    Args:
        image, text: cosines ``[b, tasks]`` float64; None for a modality that no row has.
        config: weights, and `missing_modality`.
        has_image: bool ``[b]``, which rows of `image` count; None for all.

    Where an image is missing its term is left out ("drop": the odds that the text gives are then the same with and
    without an image), or the text takes its weight over ("rescale"). A missing text likewise.
    """
    alpha, beta = config.image_weight, config.text_weight
    if text is None:
        return image * (alpha + beta if config.missing_modality == "rescale" else alpha)
    text_only = text * (alpha + beta if config.missing_modality == "rescale" else beta)
    if image is None:
        return text_only
    both = alpha * image + beta * text
    return both if has_image is None else torch.where(has_image[:, None], both, text_only)


def batch_cosines(cosine: Tensor, counted: Tensor | None = None) -> Tensor:
    """Each task's largest cosine over the rows that count, for all rows: how the authors' code routes a batch."""
    if cosine.shape[0] == 0:
        return cosine
    if counted is not None:
        if not bool(counted.any()):
            return cosine
        cosine = torch.where(counted[:, None], cosine, torch.full_like(cosine, -torch.inf))
    return cosine.amax(0, keepdim=True).expand_as(cosine)


def routing_weights(similarities: Tensor, temperature: float) -> Tensor:
    """``d = softmax(r / T)`` over the tasks (HiDe, equation 4)."""
    # The largest is taken off before the division, which overflows for the smallest temperatures.
    return torch.softmax((similarities - similarities.amax(-1, keepdim=True)) / temperature, dim=-1)


def _unit(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 0, norm, torch.ones_like(norm))
