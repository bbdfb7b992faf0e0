"""Anchors: the mean image and text feature of each task, gathered as the data goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.errors import NumericalError
from hpa_ext.hide.anchor_file import read_means, write_means
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.routing import batch_cosines, cosines, routing_weights, similarity


@dataclass
class Mean:
    """A streaming mean of rows, in float64 on the CPU, with their count."""

    count: int
    mean: Tensor

    def add(self, count: int, mean: Tensor) -> None:
        """Take in `count` more rows with this mean."""
        self.count += count
        self.mean = self.mean + (mean - self.mean) * (count / self.count)


@dataclass(eq=False)
class Anchors:
    """Per task the mean of its image features and of its text features (HiDe, equation 2), in the order of the tasks.

    Attributes:
        features: what the features are (see ``Features.describe``), or None if nobody said. A model refuses anchors
            of other features than its own.
    """

    features: Mapping[str, Any] | None = None
    _means: dict[str, dict[str, Mean]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order in which they came."""
        return list(self._means)

    def __contains__(self, task: str) -> bool:
        return task in self._means

    def update(self, task: str, image_features: Tensor | None = None, text_features: Tensor | None = None) -> Anchors:
        """Add the features of some samples of a task.

        Args:
            task: its name; a new one is put last.
            image_features: ``[n, d_v]``, any float dtype and device; None or no rows adds nothing.
            text_features: ``[n, d_t]``, likewise. The two counts may differ.

        Returns:
            The anchors themselves.

        Raises:
            TypeError, ValueError: not a matrix, or another width than the features that came before.
            NumericalError: NaN or Inf. In either case nothing was added.
        """
        if not isinstance(task, str) or not task:
            raise ValueError(f"task: expected a name, got {task!r}")
        given = {
            modality: value
            for modality, value in (("image", image_features), ("text", text_features))
            if value is not None
        }
        if not given:
            raise ValueError("image_features, text_features: expected at least one of them, got None twice")
        rows = {modality: self._checked(modality, value, task) for modality, value in given.items()}
        means = self._means.setdefault(task, {})
        for modality, value in rows.items():
            if value.shape[0] == 0:
                continue
            mean = value.mean(0)
            if modality in means:
                means[modality].add(value.shape[0], mean)
            else:
                means[modality] = Mean(value.shape[0], mean)
        return self

    def route(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        config: HiDeConfig | None = None,
        has_image: Tensor | None = None,
    ) -> Tensor:
        """Routing weights of samples: ``softmax(r / T)`` with ``r = alpha cos_v + beta cos_ins`` (equations 3 and 4).

        Args:
            image_features: ``[b, d_v]``; None for samples without images.
            text_features: ``[b, d_t]``; None for samples without text.
            config: weights, temperature, `routing` and `missing_modality`; None for the paper's.
            has_image: bool ``[b]``, which rows of image_features count; None for all.

        Returns:
            ``[b, tasks]`` in the order in which the tasks came, each row with sum 1, on the features' device; float64
            for float64 features, else float32. Computed in float64.

        Raises:
            TypeError, ValueError: there are no tasks, a shape does not fit, or a task has no anchor of a modality that
                counts.
            NumericalError: a feature that counts is NaN or Inf.
        """
        config = HiDeConfig() if config is None else config
        if not self._means:
            raise ValueError("anchors: expected at least one task, got none; call update first")
        given = {"image": image_features, "text": text_features}
        sizes = {modality: len(value) for modality, value in given.items() if value is not None}
        if not sizes:
            raise ValueError("image_features, text_features: expected at least one of them, got None twice")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"text_features: expected {sizes['image']} rows like image_features, got {sizes['text']}")
        weights = {"image": config.image_weight, "text": config.text_weight}
        # A modality without weight needs no anchors, so that one alone can be tried.
        used = {modality: value for modality, value in given.items() if value is not None and weights[modality] > 0}
        if not used:
            alone = next(iter(sizes))
            raise ValueError(f"{alone}_weight: expected a positive one, because there are no other features, got 0")
        if has_image is not None and "image" in used:
            _check_mask(has_image, sizes["image"])
            has_image = has_image.to(image_features.device)
            used["image"] = torch.where(has_image[:, None], image_features, torch.zeros_like(image_features))
        found = {modality: self._cosines(modality, value) for modality, value in used.items()}
        if config.routing == "batch":
            counted = {"image": has_image, "text": None}
            found = {modality: batch_cosines(value, counted[modality]) for modality, value in found.items()}
        first = next(value for value in given.values() if value is not None)
        result = routing_weights(
            similarity(found.get("image"), found.get("text"), config, has_image if "image" in found else None),
            config.temperature,
        )
        return result if first.dtype == torch.float64 else result.float()

    def count(self, task: str, modality: str) -> int:
        """How many samples of a task were counted for a modality ("image" or "text")."""
        found = self._of(task).get(modality)
        return 0 if found is None else found.count

    def mean(self, task: str, modality: str) -> Tensor:
        """The anchor of a task, ``[d]`` float64 on the CPU. ValueError if it has none of this modality."""
        found = self._of(task).get(modality)
        if found is None:
            raise ValueError(f"anchors: task {task!r} has no {modality} features")
        return found.mean.clone()

    def merge_(self, other: Anchors) -> Anchors:
        """Add the samples of other anchors, as several processes gather them; new tasks are put last.

        Empty anchors that nobody has described take over the description of the others.
        """
        if self.features is not None and other.features is not None and dict(self.features) != dict(other.features):
            raise ValueError(f"other: expected anchors of {dict(self.features)}, got {dict(other.features)}")
        for means in other._means.values():
            for modality, found in means.items():
                width = self._width(modality)
                if width not in (None, found.mean.shape[0]):
                    raise ValueError(f"other: expected {modality} features of width {width}, got {len(found.mean)}")
        if not self._means and self.features is None:
            self.features = other.features
        for task, means in other._means.items():
            mine = self._means.setdefault(task, {})
            for modality, found in means.items():
                if modality in mine:
                    mine[modality].add(found.count, found.mean)
                else:
                    mine[modality] = Mean(found.count, found.mean.clone())
        return self

    def remove(self, task: str) -> Anchors:
        """Forget a task; the others are untouched."""
        self._of(task)
        del self._means[task]
        return self

    def select(self, tasks: list[str]) -> Anchors:
        """New anchors with these tasks, in this order."""
        chosen = Anchors(self.features)
        for task in tasks:
            chosen._means[task] = {m: Mean(found.count, found.mean.clone()) for m, found in self._of(task).items()}
        return chosen

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        means = {
            task: {modality: (found.count, found.mean) for modality, found in of_task.items()}
            for task, of_task in self._means.items()
        }
        return write_means(path, means, self.features)

    @classmethod
    def load(cls, path: str | Path) -> Anchors:
        """Read what `save` wrote. ValueError if the file is another, or broken."""
        means, features = read_means(path)
        anchors = cls(features)
        for task, of_task in means.items():
            anchors._means[task] = {modality: Mean(*found) for modality, found in of_task.items()}
        return anchors

    def _of(self, task: str) -> dict[str, Mean]:
        if task not in self._means:
            raise ValueError(f"task: expected one of {', '.join(self.tasks) or '(none)'}, got {task!r}")
        return self._means[task]

    def _width(self, modality: str) -> int | None:
        for means in self._means.values():
            if modality in means:
                return means[modality].mean.shape[0]
        return None

    def _cosines(self, modality: str, features: Tensor) -> Tensor:
        rows = self._checked(modality, features, None)
        missing = [task for task, means in self._means.items() if modality not in means]
        if missing:
            raise ValueError(
                f"anchors: expected {modality} features for every task, got none for {missing[0]!r}; gather them, or "
                f"set {modality}_weight to 0"
            )
        anchors = torch.stack([means[modality].mean for means in self._means.values()])
        return cosines(rows, anchors.to(rows.device))

    def _checked(self, modality: str, value: Any, task: str | None) -> Tensor:
        """The features as float64 rows, on the CPU if they are to be kept."""
        name = f"{modality}_features"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor [n, d], got {type(value).__name__}")
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(f"{name}: expected float [n, d], got {value.dtype} {list(value.shape)}")
        width = self._width(modality)
        if width is not None and value.shape[1] != width:
            raise ValueError(f"{name}: expected width {width} like the features before, got {value.shape[1]}")
        rows = value.detach().double()
        rows = rows if task is None else rows.cpu()
        bad = (~torch.isfinite(rows)).any(1)
        if bool(bad.any()):
            where = "" if task is None else f" of task {task!r}"
            raise NumericalError(f"{name}{where} hold NaN or Inf in {int(bad.sum())} of {len(rows)} rows")
        return rows


def _check_mask(has_image: Any, rows: int) -> None:
    if not isinstance(has_image, Tensor) or has_image.dtype != torch.bool or tuple(has_image.shape) != (rows,):
        got = f"{has_image.dtype} {list(has_image.shape)}" if isinstance(has_image, Tensor) else repr(has_image)
        raise ValueError(f"has_image: expected bool [{rows}], got {got}")
