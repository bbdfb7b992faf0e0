"""Directories of the ``datasets`` library, which is needed for them alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1 << 20


def open_dataset(path: Path) -> Sequence[Any]:
    """The records of a dataset that ``Dataset.save_to_disk`` wrote.

    Raises:
        ValueError: the library is not installed, the directory is none of its, or holds several splits.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path}: a directory is read with the datasets library, which is not installed; install it "
            "(pip install datasets), or give a .json or .jsonl file"
        ) from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: not a directory that Dataset.save_to_disk wrote: {error}") from error
    if isinstance(dataset, dict):
        raise ValueError(f"{path}: holds several splits ({', '.join(dataset)}); give the directory of one of them")
    return dataset


def directory_digest(path: Path) -> str:
    """SHA-256 over the names and contents of the files in the directory."""
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.stat().st_size.to_bytes(8, "little"))
        with open(file, "rb") as contents:
            while piece := contents.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()
