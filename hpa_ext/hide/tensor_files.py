"""Safetensors files with metadata, and directories of them, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write beside `path` and rename. OSError if that fails, with `path` as it was."""
    from safetensors.torch import save_file

    path = Path(path)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: set[int] = set()
    for name, value in contiguous.items():  # safetensors refuses memory that two names share
        if value.data_ptr() in seen:
            contiguous[name] = value.clone()
        seen.add(value.data_ptr())
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(contiguous, temporary, dict(metadata))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files for the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. FileNotFoundError; ValueError naming the file if it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got a broken one ({error})") from error


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A directory to fill, which takes its name when the context ends well and is removed otherwise.

    ValueError if `directory` exists and is not empty, or is the working directory, which cannot be replaced.
    """
    directory = Path(directory).resolve()
    if directory == Path.cwd():
        raise ValueError(f"directory: expected one to make, got {directory}, in which this process works")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory: expected a new or an empty one, got {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp makes directories for the owner alone
        if directory.exists():
            directory.rmdir()
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
