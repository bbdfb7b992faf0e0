"""A post-training method on the whole model: Grams before and after a step, then every linear of the decoder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.baselines.layer import LayerContext
from hpa_ext.baselines.registry import Method
from hpa_ext.baselines.tuning_step import tensor_bytes
from hpa_ext.calibration import calibrate
from hpa_ext.errors import NumericalError
from hpa_ext.gram import GramCollection
from hpa_ext.hpa.report import LayerReport
from hpa_ext.models.linear import Linear
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import layer_depth, unwrap

from .alignment import alignment_directions
from .data import SequenceData, StepData
from .earlier_grams import EarlierGrams
from .encoding import EncodedSample, training_batch
from .output_change import OutputChange

_CALIBRATION_BATCH = 64
_MEMORY_OPTIONS = {"form": "memory", "rank": "memory_rank"}


class PostTraining:
    """Applies ``method.function(old, new, layer, **options)`` to each linear after each tuning step.

    What tuning and the method left of earlier steps is kept here for the methods that look back.
    """

    def __init__(self, method: Method, options: dict[str, Any], data: SequenceData, cache: Path | None) -> None:
        self.method, self.options, self.data, self.cache = method, options, data, cache
        self._safety: GramCollection | None = None
        self._initial: dict[str, Tensor] = {}
        self._updates: dict[str, list[Tensor]] = {}
        self._earlier: EarlierGrams | None = None
        if "earlier-grams" in method.needs:
            given = {key: options[name] for key, name in _MEMORY_OPTIONS.items() if name in options}
            self._earlier = EarlierGrams(**given)
        self._seconds, self._records, self._bytes = 0.0, [], 0
        self._changes: list[OutputChange | None] = []
        self._looking = 0.0  # the seconds that measuring the change took, which are not the method's
        self._change: OutputChange | None = None

    def before(self, model: nn.Module) -> None:
        """Calibrate the old model on the safety set; for a method that wants it, put the initial weights back first."""
        began = time.process_time()
        if "history" in self.method.needs:
            linears = find_linears(model)
            if not self._initial:
                self._initial = {name: linear.base_weight().clone() for name, linear in linears.items()}
            for name, linear in linears.items():
                linear.base_weight().copy_(self._initial[name])
        if "sequential" not in self.method.needs:
            self._safety = self._grams(model, self.data.safety_calibration)
        self._seconds = time.process_time() - began

    @torch.no_grad()
    def after(self, model: nn.Module, data: StepData, seed: int) -> nn.Module:
        """Calibrate the tuned PeftModel on the task, merge, and return the plain model.

        NumericalError, ValueError: from the method, starting with the module's name.
        """
        # Whoever uses such a method has the unaligned model; making one here is not its cost.
        alignment = alignment_directions(self.data, self.cache) if "alignment" in self.method.needs else {}
        began = time.process_time()
        self._records, self._changes, self._looking = [], [], 0.0
        grams: list[GramCollection] = []
        if "sequential" in self.method.needs:
            for names in _by_decoder_layer(model):
                with model.disable_adapter():
                    safety = self._grams(model, self.data.safety_calibration, names)
                pair = safety, self._grams(model, data.calibration, names)
                for linear, merged in self._merge(model, names, *pair, alignment, seed):
                    linear.base_weight().copy_(merged)
                    linear.absorb_adapters()
                grams += pair
        else:
            grams = [self._safety, self._grams(model, data.calibration)]
            # All are merged before the first is written: a method that fails leaves the model as it was.
            for linear, merged in list(self._merge(model, None, *grams, alignment, seed)):
                linear.base_weight().copy_(merged)
        self._change = OutputChange.mean([change for change in self._changes if change is not None])
        if self._earlier is not None:
            self._earlier.add(grams[1])
        kept = [*self._initial.values(), *(update for updates in self._updates.values() for update in updates)]
        sums = [gram.state_dict()["sum"] for collection in grams for gram in collection.distinct().values()]
        self._bytes = tensor_bytes([*sums, *kept, *alignment.values()])
        self._bytes += self._earlier.nbytes() if self._earlier is not None else 0
        plain = model.unload()
        self._seconds += time.process_time() - began - self._looking
        return plain

    def _merge(
        self,
        model: nn.Module,
        names: list[str] | None,
        safety: GramCollection,
        task: GramCollection,
        alignment: Mapping[str, Tensor],
        seed: int,
    ) -> Iterator[tuple[Linear, Tensor]]:
        """Each linear (of these names) with the method's weight for it."""
        earlier = self._earlier.matrices(task) if self._earlier is not None else {}
        for name, linear in find_linears(model, names).items():
            old, new = linear.base_weight().clone(), linear.weight()
            layer = LayerContext(
                name=name,
                depth=layer_depth(unwrap(model), name),
                safety=safety[name],
                task=task[name],
                initial=self._initial.get(name),
                earlier_updates=tuple(self._updates.get(name, ())),
                alignment=alignment.get(name),
                earlier=earlier.get(name),
                seed=seed,
                records=self._records,
            )
            try:
                merged = self.method.function(old, new, layer, **self.options)
            except NumericalError as error:
                raise error.in_module(name) from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if "history" in self.method.needs:
                self._updates.setdefault(name, []).append(new - old)
            else:
                started = time.process_time()
                found = OutputChange.of(old, new, merged, layer.safety.matrix(), layer.task.matrix())
                self._changes.append(found)
                self._looking += time.process_time() - started
            yield linear, merged

    def measured(self) -> dict[str, Any]:
        """Of the last step: seconds and bytes that the method took, what it left of the update (see `OutputChange`; not
        for a method that adds up the updates of all steps), and what it reported of the layers.
        """
        found: dict[str, Any] = {"method_seconds": self._seconds, "method_bytes": self._bytes}
        if self._change is not None:
            found["safety_left"] = round(self._change.safety_left, 4)
            found["task_lost"] = round(self._change.task_lost, 4)
        reports = [record for record in self._records if isinstance(record, LayerReport)]
        if reports:
            found["layers"] = _summary(reports)
        return found

    def _grams(self, model: nn.Module, samples: list[EncodedSample], names: list[str] | None = None) -> GramCollection:
        starts = range(0, len(samples), _CALIBRATION_BATCH)
        batches = [training_batch(samples[start : start + _CALIBRATION_BATCH]) for start in starts]
        return calibrate(model, batches, names, token_mask=self.data.settings.calibration_tokens, progress=False)


def _by_decoder_layer(model: nn.Module) -> list[list[str]]:
    """Names of the decoder's linears, layer by layer from below."""
    found: dict[float, list[str]] = {}
    for name in find_linears(model):
        found.setdefault(layer_depth(unwrap(model), name), []).append(name)
    return [found[depth] for depth in sorted(found)]


def _summary(reports: list[LayerReport]) -> dict[str, list[float]]:
    """What the pictures of the report need, a value for each linear, in few bytes."""
    return {
        "columns": [len(report.retained) for report in reports],
        "retained": [report.retained_count for report in reports],
        "safety": [int(report.safety_columns.sum()) for report in reports],
        "shared": [report.shared_count for report in reports],
        "alpha": [round(report.alpha, 3) for report in reports],
    }
