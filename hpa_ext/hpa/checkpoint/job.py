"""What a run will do, found out and checked before it does anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.buffers import Buffers, Row
from hpa_ext.checkpoints.identity import identity
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.grams import GramSource, check_gram, fingerprint_of, open_grams
from hpa_ext.hpa.checkpoint.method import CheckpointMethod
from hpa_ext.hpa.checkpoint.models import Models, check_weights, entry_of
from hpa_ext.hpa.config import HPAConfig
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate
from hpa_ext.models.linear import Linear

OUTPUTS = ("checkpoint", "adapter")


def _hpa() -> CheckpointMethod:
    from hpa_ext.hpa.checkpoint.hpa_method import HPAMethod  # which is made of functions of a Job

    return HPAMethod()


@dataclass
class Job:
    """Inputs that fit together, and the modules to harmonize.

    Attributes:
        old: the model before the tuning step.
        new: the model after it: a checkpoint of its own, or `old` with the adapter on top.
        adapter: the adapter, None if `new` is a whole checkpoint.
        output: "checkpoint" or "adapter".
        linears: what is harmonized, by canonical module name.
        depths: layer / number of layers of each.
        shared: other names of a weight that is harmonized under its first name.
        not_covered: see `ModelReport`.
        method: what is done to a weight.
    """

    old: CheckpointWeights
    new: CheckpointWeights
    adapter: LoraAdapter | None
    output: str
    config: HPAConfig
    safety: Mapping[str, Gram | GramDiagonal]
    task: Mapping[str, Gram | GramDiagonal]
    linears: dict[str, Linear]
    depths: dict[str, float]
    shared: dict[str, str] = field(default_factory=dict)
    not_covered: list[str] = field(default_factory=list)
    method: CheckpointMethod = field(default_factory=_hpa)

    @property
    def names(self) -> list[str]:
        """Canonical names of the harmonized modules, in the model's order."""
        return list(self.linears)

    @property
    def warnings(self) -> list[str]:
        """A line for each harmonized weight that is the input embedding as well."""
        embedding = getattr(self.new.model.get_input_embeddings(), "weight", None)
        tied = [name for name, linear in self.linears.items() if linear.base.weight is embedding]
        return [f"{name} shares its weight with the input embedding, which has changed with it" for name in tied]

    @property
    def source(self) -> CheckpointReader:
        """The files that the output has the names, the order and the copied bytes of."""
        return self.old.reader if self.adapter is not None else self.new.reader

    def weight_update(
        self, module: str, buffers: Buffers | Row | None = None, new_buffers: Buffers | Row | None = None
    ) -> WeightUpdate:
        """The old weight and the update of a module, read from disk into memory of `buffers` where that serves.

        A new weight goes into memory of `new_buffers`, if given.
        """
        buffers = Buffers() if buffers is None else buffers
        new_buffers = buffers if new_buffers is None else new_buffers
        name, transposed = f"{module}.weight", self.linears[module].is_transposed
        old = _matrix(_read(self.old, name, buffers), transposed)
        if self.adapter is None or not has_low_rank(self.adapter, module):
            return DenseUpdate(old, _matrix(_read(self.new, name, new_buffers), transposed))
        update = self.adapter.updates[module]
        return LowRankUpdate(old, update.a, update.b, update.scaling)

    def kind_of(self) -> Callable[[str], tuple[str, str | None]]:
        """The function from a name on disk to what happens to that tensor, as `cut` takes it."""
        covered = {id(linear.base.weight): name for name, linear in self.linears.items()}
        merged = {
            self.new.disk_name[name]: covered[id(parameter)]
            for name, parameter in self.new.model.named_parameters(remove_duplicate=False)
            if id(parameter) in covered and name in self.new.disk_name
        }
        changed = {disk for disk, canonical in self.new.canonical_name.items() if self.new.is_changed(canonical)}

        def kind(disk: str) -> tuple[str, str | None]:
            if disk in merged:
                return "merge", merged[disk]
            return ("update" if disk in changed else "copy"), None

        return kind

    def identity(self, device: torch.device) -> dict[str, object]:
        """Everything that decides the result, as JSON values."""
        inputs = {
            "old": self.old.reader.fingerprint(),
            "old_adapters": [adapter.fingerprint() for adapter in self.old.adapters],
            "new": self.adapter.fingerprint() if self.adapter is not None else self.new.reader.fingerprint(),
            "safety": fingerprint_of(self.safety, self.names),
            "task": fingerprint_of(self.task, self.names),
        }
        settings = {"method": "HPA", **self.config.to_dict(), "modules": self.names, "device": device.type}
        return identity(self.output, inputs, settings)

    def close(self) -> None:
        """Close the files of the models."""
        self.old.close()
        if self.new is not self.old:
            self.new.close()


def prepare(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    safety: GramSource,
    task: GramSource,
    config: HPAConfig | None,
    output: str,
    old_adapters: Sequence[str | os.PathLike[str]],
    modules: str | Iterable[str] | None,
) -> Job:
    """Open everything and refuse what does not fit; see `harmonize_checkpoint` for the arguments and errors."""
    config = HPAConfig() if config is None else config
    if not isinstance(config, HPAConfig):
        raise TypeError(f"config: expected an HPAConfig, got {type(config).__name__}")
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    safety_grams, task_grams = open_grams("safety", safety), open_grams("task", task)

    models = Models.open(old, new, old_adapters, modules)
    _check_output_kind(output, models.adapter, config, list(models.linears))
    for name, linear in models.linears.items():
        check_weights(name, models)
        in_features = linear.base_weight().shape[1]
        check_gram("safety", name, safety_grams, in_features, config.damping)
        check_gram("task", name, task_grams, in_features, config.damping)
    return models.job(Job, output=output, config=config, safety=safety_grams, task=task_grams)


def _check_output_kind(output: str, adapter: LoraAdapter | None, config: HPAConfig, names: list[str]) -> None:
    if output != "adapter":
        return
    if adapter is None:
        raise ValueError('output: "adapter" needs a LoRA adapter as new, got a whole checkpoint')
    if config.granularity != "input":
        raise ValueError(
            'output: "adapter" is exact with granularity="input" alone, whose result is a column gain and a masked A; '
            f"got granularity={config.granularity!r}"
        )
    dense = [name for name in names if not has_low_rank(adapter, name)]
    if dense:
        raise ValueError(
            f'output: "adapter" cannot hold {dense[0]}, whose update is no product B A '
            '(use_dora, modules_to_save, or an adapter that was harmonized already); write output="checkpoint"'
        )


def has_low_rank(adapter: LoraAdapter, module: str) -> bool:
    """Whether the adapter's update of a module is ``scaling * b @ a`` and nothing else."""
    if module not in adapter.updates or f"{module}.weight" in adapter.replaced or module in adapter.gain:
        return False
    return "magnitude" not in adapter.entries(module)


def _read(weights: CheckpointWeights, name: str, buffers: Buffers | Row) -> Tensor:
    if weights.is_changed(name):
        return weights.tensor(name)
    entry = entry_of(weights, name)
    return weights.reader.read(entry.name, buffers.take(entry.tensor_shape, entry.dtype))


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.mT if transposed else weight
