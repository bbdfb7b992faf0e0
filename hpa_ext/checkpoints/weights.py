"""The weights of a model on disk, adapters included, by the names of today's transformers class, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hpa_ext.checkpoints.adapter import LoraAdapter
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.lora_update import Step, apply_steps
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.models.key_names import map_names
from hpa_ext.models.layer_sizes import layer_sizes
from hpa_ext.models.skeleton import skeleton
from hpa_ext.models.structure import decoder_name, in_module


class CheckpointWeights:
    """A checkpoint's tensors by canonical name (that of ``state_dict()`` of the transformers class).

    Args:
        path: the directory of a model in safetensors, of any generation of names.
        adapters: directories of LoRA adapters, plain or harmonized, applied in this order; each counts as trained on
            the model with the ones before it merged.

    Attributes:
        reader: the files.
        model: the model without weights, see `skeleton`.
        adapters: the opened `LoraAdapter` of each.
        canonical_name: by the name on disk, for tensors that are stored as the model holds them.
        disk_name: by the canonical name; tied parameters stored once have one disk name.
        converted: by the name on disk, the canonical name of what transformers builds from several tensors.
        ignored: names on disk that the model has no use for.
        missing: canonical names that the files do not hold, such as the vision tower in an original LLaVA checkpoint.

    Raises:
        OSError: a file is absent or cannot be read.
        ValueError: ``config.json`` describes nothing that transformers has.
        CheckpointError: tensors that fit nowhere or have another shape than the configuration says, parameters of the
            decoder that are missing, a quantised checkpoint, an adapter that does not fit.
    """

    def __init__(self, path: str | Path, adapters: Sequence[str | Path] = ()) -> None:
        if isinstance(adapters, (str, Path)):
            raise TypeError(f"adapters: expected a sequence of directories, got one {type(adapters).__name__}")
        self.reader = CheckpointReader(path)
        self.model = skeleton(self.reader.directory)
        _refuse_quantised(self.reader)
        try:
            keys = map_names(self.reader.entries, self.model)
        except ValueError as error:
            raise CheckpointError(f"{self.reader.path}: {error}") from error
        self.canonical_name = keys.canonical
        self.converted = keys.converted
        self.ignored = keys.ignored
        self.disk_name = {canonical: disk for disk, canonical in keys.canonical.items()}
        self._tie()
        self._check_shapes()
        self.missing = self._find_missing()
        self.adapters = tuple(LoraAdapter(adapter, self.model) for adapter in adapters)
        for adapter in self.adapters:
            self.check_ties(adapter)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer, adapters applied: summed in float32, rounded once to the dtype on disk.

        Args:
            name: canonical.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        base = self.reader.read(self._disk(name))
        touching = [adapter for adapter in self.adapters if adapter.touches(name)]
        if not touching:
            return base
        if not base.dtype.is_floating_point:
            raise CheckpointError(f"{self.reader.path}: {name} is {base.dtype}; adapters need a floating-point weight")
        module, _, leaf = name.rpartition(".")
        dtype, total = base.dtype, base
        steps: list[Step] = []
        for adapter in touching:
            if name in adapter.replaced:
                value = adapter.replaced[name]
                # PEFT saves the base of a tuned embedding along; the original one does not undo earlier adapters.
                if name not in adapter.base_copies or not torch.equal(value, base):
                    total, steps = value, []
            if leaf == "bias":
                total = _added_bias(total, adapter, module)
            elif (step := adapter.step(module)) is not None:
                steps.append(step)
        if steps:
            # A replacement may have more digits than the base; they count until the one rounding at the end.
            wide = total if total.dtype == dtype else total.to(torch.promote_types(total.dtype, torch.float32))
            sizes = layer_sizes(self.model.get_submodule(module))
            total = apply_steps(wide, steps, transposed=sizes is not None and sizes.transposed)
        return total.to(dtype)

    def base_tensor(self, name: str) -> Tensor:
        """A parameter or buffer as it is on disk, without adapters; raises as `tensor`."""
        return self.reader.read(self._disk(name))

    def is_changed(self, name: str) -> bool:
        """Whether an adapter changes a parameter, by its canonical name."""
        return any(adapter.touches(name) for adapter in self.adapters)

    def check_ties(self, adapter: LoraAdapter) -> None:
        """Raise CheckpointError if the adapter tunes one of several parameters that are stored as one tensor.

        The result would need two. PEFT's own merge silently changes both.
        """
        groups: dict[str, list[str]] = {}
        for canonical, disk in self.disk_name.items():
            groups.setdefault(disk, []).append(canonical)
        for disk, group in groups.items():
            touched = [name for name in group if adapter.touches(name)]
            if len(group) == 1 or not touched:
                continue
            replaced = [adapter.replaced[name] for name in touched if name in adapter.replaced]
            together = len(replaced) == len(group) and all(torch.equal(replaced[0], other) for other in replaced)
            plain = not any(adapter.step(name.rpartition(".")[0]) for name in touched)
            if together and plain:
                continue
            raise CheckpointError(
                f"{adapter.directory}: tunes {' and '.join(touched)}, which the checkpoint ties to "
                f"{' and '.join(name for name in group if name not in touched) or 'each other'} as one tensor "
                f"{disk!r}; untie the base model (save it with both tensors and tie_word_embeddings false) or leave "
                "them out of the adapter"
            )

    def close(self) -> None:
        """Close the files; reading is over."""
        self.reader.close()
        for adapter in self.adapters:
            adapter.close()

    def _disk(self, name: str) -> str:
        if name in self.disk_name:
            return self.disk_name[name]
        if name in self.converted.values():
            parts = [disk for disk, target in self.converted.items() if target == name]
            raise CheckpointError(
                f"{self.reader.path}: {name} is stored as {len(parts)} tensors such as {parts[0]!r}, which "
                "transformers converts when it loads the model; that is not done here"
            )
        kind = "it is not in the files" if name in self.missing else f"{type(self.model).__name__} has no such tensor"
        raise CheckpointError(f"{self.reader.path}: {name}: {kind}")

    def _tie(self) -> None:
        """Give tied parameters that are stored once the disk name of the one that is there."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        for group in groups.values():
            present = [name for name in group if name in self.disk_name]
            for name in group if present else ():
                self.disk_name.setdefault(name, self.disk_name[present[0]])

    def _check_shapes(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        for disk, canonical in self.canonical_name.items():
            entry = self.reader.entries[disk]
            if entry.tensor_shape != shapes[canonical]:
                raise CheckpointError(
                    f"{entry.file}: {disk} has the shape {list(entry.tensor_shape)}; expected "
                    f"{list(shapes[canonical])} of {canonical}, as config.json says"
                )

    def _find_missing(self) -> tuple[str, ...]:
        built = set(self.converted.values())
        missing = [name for name in self.model.state_dict() if name not in self.disk_name and name not in built]
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        decoder = decoder_name(self.model)
        needed = [name for name in missing if name in parameters and in_module(name, decoder)]
        if needed and not built:
            raise CheckpointError(
                f"{self.reader.path}: lacks {len(needed)} parameters of {type(self.model).__name__}'s decoder: "
                f"{', '.join(needed[:5])}"
            )
        return tuple(missing)


def _added_bias(bias: Tensor, adapter: LoraAdapter, module: str) -> Tensor:
    if module not in adapter.updates:
        return bias
    update = adapter.updates[module]
    if update.b_bias is None:
        return bias
    return bias.to(torch.promote_types(bias.dtype, torch.float32)) + update.b_bias * update.scaling


def _refuse_quantised(reader: CheckpointReader) -> None:
    config = reader.config()
    if config.get("quantization_config"):
        method = (config["quantization_config"] or {}).get("quant_method", "unknown")
        raise CheckpointError(
            f"{reader.directory}: the checkpoint is quantised ({method}); expected floating-point weights. Harmonize "
            "the unquantised model, or write the result as an adapter and load that onto the quantised one"
        )
