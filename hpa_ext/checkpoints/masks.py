"""Which columns of which tensor were retained, kept beside the weights so that it can be checked later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.shard_plan import ShardPlan
from hpa_ext.checkpoints.writer import ShardedWriter

MASKS_FILE = "hpa_masks.safetensors"

_KINDS = ("retained", "safety_columns", "task_columns")
_PLACES = "hpa_columns"


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one weight.

    Attributes:
        retained, safety_columns, task_columns: bool ``[columns]``.
        tensor: name of the weight in the output.
        old_tensor: its name in the old model on disk.
        dimension: the weight's dimension that the masks run along; 1 for input columns of ``[out, in]``.
    """

    retained: Tensor
    safety_columns: Tensor
    task_columns: Tensor
    tensor: str
    old_tensor: str
    dimension: int


def write_masks(directory: str | os.PathLike[str], layers: Mapping[str, LayerMasks]) -> Path:
    """Write ``hpa_masks.safetensors``: ``<module>.retained``, ``.safety_columns`` and ``.task_columns`` by module.

    The header says, under ``hpa_columns``, to which tensors and which of their dimensions the masks belong.

    Raises:
        ValueError: a mask is not bool with one dimension.
    """
    places = {
        module: {"tensor": layer.tensor, "old_tensor": layer.old_tensor, "dimension": layer.dimension}
        for module, layer in layers.items()
    }
    masks = {f"{module}.{kind}": getattr(layer, kind) for module, layer in layers.items() for kind in _KINDS}
    tensors = [(name, "BOOL", tuple(mask.shape)) for name, mask in masks.items()]
    plan = ShardPlan.sorted(MASKS_FILE, {_PLACES: json.dumps(places)}, tensors)
    with ShardedWriter(directory, [plan]) as writer:
        writer.create(replace=True)
        for name, mask in masks.items():
            writer.write(name, mask)
        writer.finish()
    return Path(directory) / MASKS_FILE


def read_masks(directory: str | os.PathLike[str]) -> dict[str, LayerMasks]:
    """The masks by module.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: the file does not hold what `write_masks` writes.
    """
    path = Path(directory) / MASKS_FILE
    with CheckpointReader(path) as reader:
        try:
            places = json.loads(reader.shards[0].metadata[_PLACES])
            layers = {
                module: LayerMasks(
                    *(reader.read(f"{module}.{kind}") for kind in _KINDS),
                    tensor=str(place["tensor"]),
                    old_tensor=str(place["old_tensor"]),
                    dimension=int(place["dimension"]),
                )
                for module, place in places.items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: expected masks and the tensors that they belong to, got {error!r}"
            ) from error
    return layers
