"""A PEFT LoRA adapter as a file of factors, matched to Grams by module name; the base model has no part in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.checkpoints.adapter import EXTRA_FILE, WEIGHTS_FILE, refuse_pickles
from hpa_ext.checkpoints.adapter_config import CONFIG_FILE, rank_of, read_adapter_config, scaling_of
from hpa_ext.checkpoints.adapter_keys import PREFIX, lora_part, plain_name
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.fingerprint import fingerprint
from hpa_ext.checkpoints.gain_file import GAIN_FILE, GAIN_MARK
from hpa_ext.checkpoints.header import Shard, TensorEntry
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.compromise.solution import UpdateRows
from hpa_ext.errors import NumericalError
from hpa_ext.models.key_names import KeyNames
from hpa_ext.models.layer_sizes import layer_sizes
from hpa_ext.models.skeleton import skeleton

BaseModel = str | Path | nn.Module

_DENSE = "its update is no product B A alone, which takes the base model's weights: use hpa_ext.harmonize_checkpoint"


@dataclass(frozen=True)
class LoraModule:
    """The LoRA of one module.

    Attributes:
        name: the module's name in the loaded transformers model, as Grams have it.
        file_name: what the file calls it, without PEFT's prefix.
        entries: where its tensors lie: a, b, and where there are such, magnitude and b_bias.
    """

    name: str
    file_name: str
    entries: Mapping[str, TensorEntry]

    @property
    def in_features(self) -> int:
        """Width of its input."""
        return self.entries["a"].shape[1]


class AdapterFile:
    """An adapter on disk, read tensor by tensor.

    Args:
        path: the adapter's directory.
        base: the model that it belongs to, or its directory, of which ``config.json`` alone is read: for names of
            another generation of transformers or of the original LLaVA. None: names are taken as they are.

    Attributes:
        directory, config: where it lies, and ``adapter_config.json``.
        modules: `LoraModule` by canonical name, in the order of the file.
        others: keys that are no part of a LoRA (``modules_to_save``, trained biases), by the parameter's name.

    Raises:
        OSError: a file is absent or cannot be read.
        CheckpointError: another kind of adapter, an option that is refused, pickles, half a LoRA, a wrong shape, an
            adapter with HPA's gain, a name that is none of the base's.
    """

    def __init__(self, path: str | Path, base: BaseModel | None = None) -> None:
        self.directory = Path(path)
        self.config: dict[str, Any] = read_adapter_config(self.directory)
        refuse_pickles(self.directory)
        self._reader = CheckpointReader(self.directory, file=WEIGHTS_FILE)
        if GAIN_MARK in self.shard.metadata or (self.directory / GAIN_FILE).is_file():
            raise CheckpointError(
                f"{self.directory}: was harmonized with HPA already, and its column gain acts on the base weights; "
                "expected the adapter that the step trained"
            )
        names = _Names(self.directory, base)
        found: dict[str, LoraModule] = {}
        self.others: dict[str, str] = {}
        for entry in self._reader.entries.values():
            module, part = lora_part(entry.name)
            if part is None:
                if ".lora_" in entry.name:
                    raise CheckpointError(f"{entry.file}: {entry.name!r} is no part of a LoRA that is understood")
                self.others[names.parameter(plain_name(entry.name))] = entry.name
                continue
            name = names.module(module)
            known = found.setdefault(name, LoraModule(name, module, {}))
            if part in known.entries or known.file_name != module:
                raise CheckpointError(f"{entry.file}: {entry.name!r} and another tensor both belong to {name}")
            known.entries[part] = entry
        if not found:
            raise CheckpointError(f"{self.directory}: the adapter holds no LoRA")
        self.modules = found
        for one in found.values():
            self._check_shapes(one)

    @property
    def shard(self) -> Shard:
        """The file ``adapter_model.safetensors``."""
        return self._reader.shards[0]

    @property
    def files(self) -> list[Path]:
        """Every file that counts: the configuration, the tensors, LLaVA's trained projector."""
        names = [CONFIG_FILE, WEIGHTS_FILE, EXTRA_FILE]
        return [self.directory / name for name in names if (self.directory / name).is_file()]

    def choose(self, in_grams: Mapping[str, Iterable[str]], modules: str | Iterable[str] | None) -> list[str]:
        """The modules to harmonize, layer by layer, once all of them can be.

        Args:
            in_grams: the names that each Gram mapping has, by argument.
            modules: a regular expression that must match a whole name, or names; None for every module that any Gram
                mapping has.

        Raises:
            ValueError: nothing is left to do, a Gram is missing, or a name does not exist.
            CheckpointError: what cannot be harmonized without the base: DoRA, ``lora_bias``, trained biases and
                replaced weights of these modules.
        """
        known = {argument: set(names) for argument, names in in_grams.items()}
        anywhere = set().union(*known.values())
        if modules is None:
            chosen = [name for name in self.modules if name in anywhere]
        elif isinstance(modules, (str, re.Pattern)):
            try:
                pattern = re.compile(modules)
            except re.error as error:
                raise ValueError(f"modules: not a regular expression: {modules!r} ({error})") from error
            chosen = [name for name in self.modules if pattern.fullmatch(name)]
        else:
            wanted = list(modules)
            missing = [name for name in wanted if name not in self.modules]
            if missing:
                raise ValueError(f"modules: the adapter has no LoRA on {missing[0]!r}{self._examples()}")
            chosen = [name for name in self.modules if name in set(wanted)]
        chosen.sort(key=_by_layer)
        if not chosen:
            what = "the Grams name none" if modules is None else f"modules={modules!r} matches none"
            grams = f"; the Grams have such as {min(anywhere)}" if anywhere else "; the Grams are empty"
            raise ValueError(
                f"{self.directory}: {what} of the modules that the adapter tunes{self._examples()}{grams}; for names "
                "of another generation pass base=, the model's directory (its config.json alone is read)"
            )
        for name in chosen:
            for argument, names in known.items():
                if name not in names:
                    raise ValueError(f"{name}: no Gram in {argument}; it has {len(names)} names")
        self._refuse_dense(set(chosen) | (anywhere if modules is None else set()))
        return chosen

    def update(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A ``[r, in]``, B ``[out, r]`` and the scaling of a module; NumericalError for NaN or Inf."""
        module = self.modules[name]
        factors = [self._reader.read(module.entries[part].name) for part in ("a", "b")]
        for part, factor in zip("AB", factors, strict=True):
            bad = int((~torch.isfinite(factor)).sum())
            if bad:
                raise NumericalError(
                    f"lora_{part}: the matrix {list(factor.shape)} holds {bad} NaN or Inf",
                    module=name,
                    failing_minor=-1,
                )
        return factors[0], factors[1], scaling_of(self.config, module.file_name)

    def rows(self, name: str, device: torch.device) -> UpdateRows:
        """A module's update on a device."""
        a, b, scaling = self.update(name)
        return UpdateRows.of_lora(a.to(device), b.to(device), scaling)

    def read_into(self, key: str, buffer: memoryview) -> None:
        """The bytes of a tensor, whatever its type."""
        self._reader.read_into(key, 0, buffer)

    def fingerprint(self) -> str:
        """Of all files that count: see `hpa_ext.checkpoints.fingerprint`."""
        return fingerprint(self.files)

    def close(self) -> None:
        """Close the files; reading is over."""
        self._reader.close()

    def _check_shapes(self, module: LoraModule) -> None:
        where = f"{self.shard.file_name}: {module.file_name}"
        entries = module.entries
        for part, other in (("a", "B"), ("b", "A")):
            if part not in entries:
                raise CheckpointError(f"{where}: has lora_{other} without the other half")
        a, b = entries["a"], entries["b"]
        rank = rank_of(self.config, module.file_name)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{where}: expected A [{rank}, in] and B [out, {rank}] by {CONFIG_FILE}, got {list(a.shape)} and "
                f"{list(b.shape)}"
            )
        for entry in entries.values():
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                raise CheckpointError(f"{where}: expected 16 bits or more, floating point, got {entry.dtype_tag}")

    def _refuse_dense(self, names: set[str]) -> None:
        """Refuse what cannot be harmonized without the base, of modules that would be."""
        for name, module in self.modules.items():
            if name not in names:
                continue
            if "magnitude" in module.entries or self.config.get("use_dora"):
                raise CheckpointError(f"{self.directory}: {name} has DoRA (use_dora): {_DENSE}")
            if "b_bias" in module.entries:
                raise CheckpointError(
                    f"{self.directory}: {name} has lora_bias, an offset of the outputs that no Gram bounds; train "
                    "without it"
                )
            if "lora_embedding" in module.entries["a"].name:
                raise CheckpointError(f"{self.directory}: {name} is an embedding, whose inputs have no Gram")
        for parameter in self.others:
            owner, _, leaf = parameter.rpartition(".")
            if owner in names and leaf == "weight":
                raise CheckpointError(f"{self.directory}: {owner} is in modules_to_save: {_DENSE}")
            if owner in names:
                raise CheckpointError(
                    f"{self.directory}: {parameter} was trained (bias={self.config.get('bias')!r}), an offset of the "
                    "outputs that no Gram bounds; train with bias='none'"
                )

    def _examples(self) -> str:
        names = list(self.modules)
        return f"; it tunes {len(names)}, such as {names[0]}"


def _by_layer(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


class _Names:
    """From the file's names to those of the loaded model."""

    def __init__(self, directory: Path, base: BaseModel | None) -> None:
        self._directory, self._names = directory, None
        if base is not None:
            model = base if isinstance(base, nn.Module) else skeleton(base)
            extra = [f"{name}.weight" for name, module in model.named_modules() if layer_sizes(module) is not None]
            self._names = KeyNames(model, extra=extra)

    def parameter(self, name: str) -> str:
        if self._names is None:
            return name
        found = self._names.canonical(name)
        if found is None:
            raise CheckpointError(
                f"{self._directory}: {PREFIX}{name} belongs to nothing in {self._names.model_class}; tried "
                f"{', '.join(self._names.tried(name))}"
            )
        return found

    def module(self, name: str) -> str:
        return self.parameter(f"{name}.weight").removesuffix(".weight")
