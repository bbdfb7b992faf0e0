"""Gathering anchors: while a model is trained, or from batches with the vision tower alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.features import Features
from hpa_ext.hide.prompts import bound_inputs, prompt_of
from hpa_ext.hide.routing_state import Prompt, image_rows
from hpa_ext.hide.structure import vision_tower_name
from hpa_ext.models.structure import unwrap


class AnchorCollector:
    """Adds every sample that goes through a model to the anchors of a task, at no forward of its own.

    Args:
        model: a transformers model, or a PeftModel around one.
        anchors: what is added to.
        task: whose samples they are.
        features: what is gathered.
    """

    def __init__(self, model: nn.Module, anchors: Anchors, task: str, features: Features) -> None:
        self.anchors, self.task, self.features = anchors, task, features
        self.enabled = True
        self._model = unwrap(model)
        self._prompt: Prompt | None = None
        self._images: list[torch.Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[AnchorCollector]:
        """Within the context forwards of the model count, unless `enabled` is False."""
        handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        tower = vision_tower_name(self._model)
        if tower is not None and self.features.image is not None:
            handles.append(self._model.get_submodule(tower).register_forward_hook(self._tower))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._prompt = prompt_of(self._model, bound_inputs(self._model, args, kwargs)) if self.enabled else None
        self._images = []

    def _tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.enabled:
            self._images.append(self.features.image(output))

    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.enabled and self._prompt is not None:
            images = torch.cat(self._images) if self._images else None
            add_prompts(self.anchors, self.task, self.features, self._prompt, images)


def add_prompts(anchors: Anchors, task: str, features: Features, prompt: Prompt, images: torch.Tensor | None) -> None:
    """Add a batch of prompts, with the features of their images, to the anchors of a task.

    A sample with several images counts once, with their mean.
    """
    image = None
    if images is not None:
        rows, has_image = image_rows(images, prompt.images_per_row(images.shape[0]))
        image = rows[has_image]
    text = None if features.text is None else features.text(prompt.input_ids, prompt.counted)
    if image is not None or text is not None:
        anchors.update(task, image, text)


@torch.no_grad()
def collect_anchors(
    model: nn.Module,
    task: str,
    batches: Iterable[Mapping[str, Any]],
    features: Features,
    anchors: Anchors | None = None,
    progress: bool = True,
) -> Anchors:
    """Anchors of a task from batches of model inputs; of the model only the vision tower runs.

    Args:
        model: a plain transformers model.
        task: its name.
        batches: mappings with ``input_ids``, ``attention_mask``, ``pixel_values`` (if there are images) and ``labels``
            (if answers are there: they do not count).
        features: what is gathered.
        anchors: what is added to; None for new ones.
        progress: show a bar when stderr is a terminal.

    Raises:
        ValueError: no batch, or one that does not fit.
    """
    anchors = Anchors(features.describe()) if anchors is None else anchors
    plain = unwrap(model)
    name = vision_tower_name(plain)
    tower = None if name is None else plain.get_submodule(name)
    device = next(plain.parameters()).device
    count = 0
    for batch in tqdm(batches, desc=f"anchors of {task}", disable=not (progress and sys.stderr.isatty())):
        inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        prompt = prompt_of(plain, inputs)
        if prompt is None:
            raise ValueError("batches: expected mappings with input_ids, got one without")
        images = None
        if tower is not None and features.image is not None and inputs.get("pixel_values") is not None:
            dtype = next(tower.parameters()).dtype
            images = features.image(tower(inputs["pixel_values"].to(dtype)))
        add_prompts(anchors, task, features, prompt, images)
        count += 1
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    return anchors
