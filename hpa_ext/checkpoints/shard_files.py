"""Which files make up a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HOW_TO_CONVERT = (
    "convert it where its pickles may be trusted: "
    "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path) of transformers writes safetensors"
)


@dataclass(frozen=True)
class ShardFiles:
    """The files of a checkpoint: their directory, their names in order, the index file's name and contents if any."""

    directory: Path
    names: tuple[str, ...]
    index_file: str | None
    index: dict[str, Any] | None


def find_shards(path: Path, file: str | None) -> ShardFiles:
    """The shards that make up the checkpoint at `path`.

    Args:
        path: a directory, a ``.safetensors`` file or an index file.
        file: name of the file in the directory to take; found by its usual name if None.

    Raises:
        OSError: there is nothing there, or it cannot be read.
        CheckpointError: it is no checkpoint in safetensors.
    """
    if file is None and not path.is_dir():
        directory, file = path.parent, path.name
        os.stat(path)  # tells an absent file from a wrong name
    elif path.is_dir():
        directory = path
        file = _plain_name(file, "file") if file is not None else _usual_file(directory)
    else:
        raise NotADirectoryError(f"{path}: expected a directory that holds {file!r}")
    if file.endswith(".safetensors"):
        return ShardFiles(directory, (file,), None, None)
    if file.endswith(".index.json"):
        index = read_json(directory / file)
        return ShardFiles(directory, tuple(_files_of(index, directory / file)), file, index)
    raise CheckpointError(f"{directory / file}: expected a .safetensors or .index.json file")


def weight_map(index: dict[str, Any], path: Path) -> dict[str, str]:
    """File name by tensor name, checked.

    Raises:
        CheckpointError: the index has no such map, or a name in it is not that of a file beside it.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: expected file names by tensor under 'weight_map', got {names!r:.200}")
    for tensor, name in names.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: tensor {tensor!r}: expected a file name, got {name!r:.200}")
        _plain_name(name, f"{path}: tensor {tensor!r}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {tensor!r}: expected a .safetensors file, got {name!r}")
    return names


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file in a directory, which cannot lead out of it."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def _files_of(index: dict[str, Any], path: Path) -> list[str]:
    """The shards that an index names, sorted: their order on disk, which is that of the layers."""
    files = sorted(set(weight_map(index, path).values()))
    absent = [name for name in files if not (path.parent / name).exists()]
    if absent:
        raise CheckpointError(
            f"{path}: names {len(files)} files, of which {len(absent)} are absent: {', '.join(absent[:5])}"
        )
    return files


def _usual_file(directory: Path) -> str:
    """The one file in a directory from which to start."""
    names = sorted(os.listdir(directory))
    if WEIGHTS_FILE in names and INDEX_FILE in names:
        files = _files_of(read_json(directory / INDEX_FILE), directory / INDEX_FILE)
        if files != [WEIGHTS_FILE]:
            raise CheckpointError(
                f"{directory}: holds {WEIGHTS_FILE} and also {INDEX_FILE}, which names {files[0]!r}: "
                "remove one of the two, or name the file to take"
            )
    for name in (INDEX_FILE, WEIGHTS_FILE):
        if name in names:
            return name
    message = f"{directory}: expected {WEIGHTS_FILE} or {INDEX_FILE}, "
    others = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not names:
        raise CheckpointError(message + "got an empty directory")
    if ADAPTER_FILE in names:
        raise CheckpointError(message + f"got an adapter ({ADAPTER_FILE})")
    if others:
        raise CheckpointError(message + f"got {', '.join(others[:5])}; name the file to take")
    if pickles:
        raise CheckpointError(message + f"got {', '.join(pickles[:5])}: pickles are not read; {_HOW_TO_CONVERT}")
    if any(name.endswith(".partial") for name in names):
        raise CheckpointError(message + "got an unfinished output; go on with it or remove it")
    raise CheckpointError(message + f"got {', '.join(names[:5])}")


def _plain_name(name: str, where: str) -> str:
    """The name itself, unless it could lead out of the directory."""
    if not is_plain_name(name):
        raise CheckpointError(f"{where}: expected the plain name of a file beside it, got {name!r}")
    return name
