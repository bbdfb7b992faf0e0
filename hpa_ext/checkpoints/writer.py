"""Safetensors files written a tensor, or a few rows, at a time, in any order, by one process or several."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hpa_ext.checkpoints.coverage import Coverage
from hpa_ext.checkpoints.digest import sha256_of
from hpa_ext.checkpoints.dtypes import TORCH_DTYPES, elements_per_item
from hpa_ext.checkpoints.files import PARTIAL, byte_view, tensor_bytes, write_atomically
from hpa_ext.checkpoints.partial_files import PartialFiles
from hpa_ext.checkpoints.shard_files import INDEX_FILE, is_plain_name
from hpa_ext.checkpoints.shard_plan import ShardPlan, check_index, index_text, plan_by_tensor


class ShardedWriter:
    """Writes safetensors files under the names ``<file>.partial``, and gives them their names when all is there.

    `create` puts headers in place and reserves all bytes, so that a full disk shows before the work; another process,
    or a later run, calls `open` instead. Tensors are then written at their known places. `finish` refuses unless every
    byte has been written, or `mark_written` has said that another process or an earlier run wrote it.
    Leaving the context closes the files and keeps what has been written; `abandon` removes it.
    Safe to use from several threads. The bytes depend on the plans and the tensors alone.

    Args:
        directory: where to write; made by `create` if its parent exists.
        plans: the files.
        index: contents of the index file, which is written last; None for none.
        index_file: its name.

    Attributes:
        required_bytes: of all files together.

    Raises:
        ValueError: file or tensor names come twice, or the index says otherwise than the plans.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plans: Sequence[ShardPlan],
        index: Mapping[str, Any] | None = None,
        index_file: str = INDEX_FILE,
    ) -> None:
        self.directory = Path(directory)
        self.plans = tuple(plans)
        self.required_bytes = sum(plan.size for plan in plans)
        self._index = index
        self._index_path = self.directory / index_file
        self._plan_of = plan_by_tensor(self.plans)
        if not is_plain_name(index_file):
            raise ValueError(f"index_file: expected a plain name, got {index_file!r}")
        if index is not None:
            check_index(index, self._plan_of)
        self._files = PartialFiles(self.directory, self.plans)
        self._coverage = {name: Coverage() for name in self._plan_of}
        self._lock = threading.Lock()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def create(self, *, replace: bool = False, reserve_bytes: int = 0) -> None:
        """Reserve the files and write their headers.

        Args:
            replace: remove files of these names, finished or not; otherwise they are an error.
            reserve_bytes: room that must be left for what else will be written to this filesystem.

        Raises:
            FileExistsError: there is such a file already.
            OSError: too little room (``ENOSPC``, with what is needed and what is free), or no permission. Nothing of
                these files is left then.
        """
        self.directory.mkdir(exist_ok=True)
        for path in (self._index_path, self._index_path.with_name(self._index_path.name + PARTIAL)):
            if self._index is not None and os.path.lexists(path):
                if not replace:
                    raise FileExistsError(errno.EEXIST, "expected no such file before writing", str(path))
                path.unlink()
        self._files.create(replace=replace, reserve_bytes=reserve_bytes)

    def open(self) -> None:
        """Open what `create` has put there, in this process or in another, now or in an earlier run.

        Raises:
            FileNotFoundError: a file is absent.
            CheckpointError: a file is not of this plan: its size or its header differs.
        """
        self._files.open()

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or some of its rows from `row` on.

        Args:
            name: the tensor's name in its plan.
            tensor: of the planned dtype; of the planned shape, or ``[rows, ...]`` with the planned other sizes. Copied
                to the CPU, and made contiguous, if it is not.
            row: where along the first dimension it goes.

        Raises:
            ValueError: no such tensor, or another dtype or shape.
            OSError: the disk is full or fails; names file and tensor.
        """
        plan = self._plan(name)
        tag, shape = plan.described(name)
        if tag not in TORCH_DTYPES or tensor.dtype != TORCH_DTYPES[tag]:
            raise ValueError(f"{name}: expected {TORCH_DTYPES.get(tag, tag)}, got {tensor.dtype}")
        if shape and elements_per_item(tag) > 1:
            shape = (*shape[:-1], shape[-1] // elements_per_item(tag))
        fits = tuple(tensor.shape) == shape and row == 0
        if shape and tensor.dim() == len(shape) and tuple(tensor.shape[1:]) == shape[1:]:
            fits = 0 <= row <= row + tensor.shape[0] <= shape[0]
        if not fits:
            raise ValueError(
                f"{name}: expected {list(shape)}, or rows of it, got {list(tensor.shape)} from row {row} on"
            )
        start, stop = plan.ranges[name]
        offset = row * ((stop - start) // shape[0]) if row else 0
        self.write_bytes(name, offset, tensor_bytes(tensor.detach().cpu().contiguous()))

    def write_bytes(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write bytes of a tensor of any type at `offset`, counted from the tensor's start; raises as `write`."""
        plan = self._plan(name)
        view = byte_view(data)
        start, stop = plan.ranges[name]
        if offset < 0 or start + offset + len(view) > stop:
            raise ValueError(
                f"{name}: expected a range within its {stop - start} bytes, got {offset} to {offset + len(view)}"
            )
        self._files.write(plan.file_name, view, start + offset, f"tensor {name!r}")
        with self._lock:
            self._coverage[name].add(offset, offset + len(view))

    def mark_written(self, names: Iterable[str]) -> None:
        """Take these tensors as written in full: by another process, or by an earlier run, as its journal says."""
        for name in names:
            start, stop = self._plan(name).ranges[name]
            with self._lock:
                self._coverage[name].add(0, stop - start)

    def missing(self) -> list[str]:
        """Names of the tensors that are not written in full."""
        with self._lock:
            return [
                name
                for name, plan in self._plan_of.items()
                if self._coverage[name].count() != plan.ranges[name][1] - plan.ranges[name][0]
            ]

    def sync(self, names: Collection[str] | None = None) -> None:
        """Have on the disk what has been written; of all files, or of those that hold the tensors `names`."""
        self._files.sync(None if names is None else {self._plan(name).file_name for name in names})

    def digest(self, file_name: str) -> str:
        """SHA-256 of a file as it is now, read back; to be asked for when all its tensors have been written."""
        plans = [plan for plan in self.plans if plan.file_name == file_name]
        if not plans:
            raise ValueError(f"file_name: expected a file of the plans, got {file_name!r}")
        return sha256_of(self._files.descriptor(file_name), plans[0].size, self._files.path(file_name))

    def descriptor(self, file_name: str) -> int:
        """The open file, for `hpa_ext.checkpoints.digest.RunningDigest`; `close` closes it."""
        return self._files.descriptor(file_name)

    def finish(self) -> None:
        """Have everything on the disk, give the files their names, and write the index last. Closes the files.

        Killed within, some files have their names and others not, and there is no index; `open` and `finish` go on.

        Raises:
            ValueError: tensors have not been written in full; names them.
            OSError: the disk fails.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"finish: expected every tensor to be written, got {len(missing)} of {len(self._plan_of)} that are "
                f"not: {', '.join(missing[:5])}"
            )
        self._files.rename()
        if self._index is not None:
            write_atomically(self._index_path, index_text(self._index))
        self.close()

    def abandon(self) -> None:
        """Close the files and remove those that are unfinished."""
        self._files.remove()

    def close(self) -> None:
        """Close the files and leave them as they are."""
        self._files.close()

    def _plan(self, name: str) -> ShardPlan:
        if name not in self._plan_of:
            raise ValueError(f"name: expected a tensor of the plans, got {name!r}")
        return self._plan_of[name]
