"""Tensors of a checkpoint on disk, read one at a time."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import byte_view, read_exactly, read_json, tensor_bytes
from hpa_ext.checkpoints.fingerprint import fingerprint
from hpa_ext.checkpoints.header import Shard, TensorEntry, read_header
from hpa_ext.checkpoints.shard_files import find_shards, weight_map
from hpa_ext.checkpoints.side_files import side_files

CONFIG_FILE = "config.json"


class CheckpointReader:
    """A checkpoint in safetensors: one file, or shards with an index.

    Opening reads and checks every header; tensors are read when asked for, by ``pread`` into memory of their own.
    (Mapped pages would count as the process's memory, and a file that is cut short meanwhile would kill it.)
    The files stay open until `close`, so that all reads see the same files. Safe to use from several threads.

    A name in an index is the plain name of a file in its directory, or it is refused. A symlink that lies in the
    directory is followed wherever it leads: the owner of the directory put it there, and the Hugging Face cache
    consists of such links.

    Args:
        path: a directory with ``model.safetensors`` or ``model.safetensors.index.json``, or one ``.safetensors`` or
            ``.index.json`` file.
        file: name of the file in the directory, where it is another, such as ``adapter_model.safetensors``.

    Attributes:
        directory: where the files lie.
        shards: the files, in order of their names.
        entries: every tensor by its name on disk, in the order of the files and of the bytes in them.

    Raises:
        OSError: a file is absent or cannot be opened or read.
        CheckpointError: truncated files, headers that do not fit, pickles, names that lead out of the directory, an
            index that differs from its shards.
    """

    directory: Path
    shards: tuple[Shard, ...]
    entries: dict[str, TensorEntry]

    def __init__(self, path: str | os.PathLike[str], file: str | None = None) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.path = Path(path)
        self._file = file
        self._files = find_shards(self.path, file)
        self.directory = self._files.directory
        shards = []
        try:
            for name in self._files.names:
                shard, descriptor = read_header(self.directory / name)
                self._descriptors[shard.path] = descriptor
                shards.append(shard)
            self.shards = tuple(shards)
            self.entries = self._gather()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._file)

    def close(self) -> None:
        """Close the files; reading is over."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is none of that name; the most similar ones are printed.
        """
        if name not in self.entries:
            near = difflib.get_close_matches(name, list(self.entries), n=3, cutoff=0.5)
            hint = f"; similar: {', '.join(map(repr, near))}" if near else ""
            raise CheckpointError(f"{self.path}: holds no tensor {name!r} among its {len(self.entries)}{hint}")
        return self.entries[name]

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor, of the shape and dtype on disk, on the CPU, in memory of its own.

        Args:
            name: its name on disk.
            out: contiguous CPU tensor of that shape and dtype to read into; a new one if None.
        """
        entry = self.entry(name)
        return self._fill(entry, 0, entry.tensor_shape, out)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor along its first dimension, ``[stop - start, ...]``; else as `read`.

        Raises:
            ValueError: the tensor has no such rows.
        """
        entry = self.entry(name)
        shape = entry.tensor_shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows: expected a range within {name!r} of shape {list(shape)}, got {start} to {stop}")
        row_bytes = entry.nbytes // shape[0] if shape[0] else 0
        return self._fill(entry, start * row_bytes, (stop - start, *shape[1:]), out)

    def read_into(self, entry: TensorEntry | str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with a tensor's bytes from `offset`, counted from the tensor's start; any type.

        Raises:
            ValueError: the range is not inside the tensor.
        """
        entry = self.entry(entry) if isinstance(entry, str) else entry
        view = byte_view(buffer)
        if offset < 0 or offset + len(view) > entry.nbytes:
            raise ValueError(
                f"range: expected within the {entry.nbytes} bytes of {entry.name!r}, got {offset} to "
                f"{offset + len(view)}"
            )
        read_exactly(self._descriptor(entry.file), view, entry.start + offset, entry.file, f"tensor {entry.name!r}")

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor into its cache in the background."""
        entry = self.entry(name)
        os.posix_fadvise(self._descriptor(entry.file), entry.start, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def index(self) -> dict[str, Any] | None:
        """The parsed index file, None for a checkpoint of one file."""
        return self._files.index

    def config(self) -> dict[str, Any]:
        """``config.json``.

        Raises:
            CheckpointError: it is absent or no JSON object.
        """
        path = self.directory / CONFIG_FILE
        if not path.exists():
            raise CheckpointError(f"{path}: expected the model's configuration, got no such file")
        return read_json(path)

    def side_files(self) -> list[Path]:
        """What a user needs beside the weights: see `hpa_ext.checkpoints.side_files`."""
        return side_files(self.directory)

    def fingerprint(self) -> str:
        """Of the configuration, the index and the shards: see `hpa_ext.checkpoints.fingerprint`."""
        names = [CONFIG_FILE] if (self.directory / CONFIG_FILE).exists() else []
        names += [self._files.index_file] if self._files.index_file else []
        return fingerprint([self.directory / name for name in names] + [shard.path for shard in self.shards])

    def _gather(self) -> dict[str, TensorEntry]:
        """All entries by name; the index and the shards must agree."""
        entries: dict[str, TensorEntry] = {}
        for shard in self.shards:
            for entry in shard.entries:
                if entry.name in entries:
                    raise CheckpointError(
                        f"{self.directory}: tensor {entry.name!r} is in both {entries[entry.name].file.name} and "
                        f"{shard.file_name}"
                    )
                entries[entry.name] = entry
        if self._files.index is None:
            return entries
        index_path = self.directory / self._files.index_file
        indexed = weight_map(self._files.index, index_path)
        for name, file_name in indexed.items():
            if name not in entries:
                raise CheckpointError(f"{index_path}: says that {file_name} holds {name!r}; it does not")
            if entries[name].file.name != file_name:
                raise CheckpointError(
                    f"{index_path}: says that {file_name} holds {name!r}; it is in {entries[name].file.name}"
                )
        unknown = [name for name in entries if name not in indexed]
        if unknown:
            raise CheckpointError(
                f"{index_path}: does not list {len(unknown)} tensors that the shards hold: "
                f"{', '.join(map(repr, unknown[:5]))}"
            )
        return entries

    def _descriptor(self, file: Path) -> int:
        try:
            return self._descriptors[file]
        except KeyError:
            state = "belongs to another reader" if self._descriptors else "the reader is closed"
            raise ValueError(f"{file}: {state}") from None

    def _fill(self, entry: TensorEntry, offset: int, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
        if out is None:
            out = torch.empty(shape, dtype=entry.dtype)
        elif out.shape != shape or out.dtype != entry.dtype or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"out: expected a contiguous CPU tensor {list(shape)} {entry.dtype} for {entry.name!r}, got "
                f"{list(out.shape)} {out.dtype} on {out.device}, strides {list(out.stride())}"
            )
        self.read_into(entry, offset, tensor_bytes(out))
        return out
