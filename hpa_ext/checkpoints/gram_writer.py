"""Writing a Gram file one Gram at a time: the tensors follow each other, the header before them is written last."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpa_ext.checkpoints.dtypes import dtype_tag
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import tensor_bytes, write_fully
from hpa_ext.checkpoints.header import MOST_HEADER_BYTES
from hpa_ext.checkpoints.triangle import triangle_length, triangle_strips
from hpa_ext.gram import Gram
from hpa_ext.gram_diagonal import GramDiagonal

METADATA_KEY = "hpa_grams"
FORMAT_VERSION = 1
FORMS = ("triangle", "inverse_diagonal")

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a Gram: the end of its name, element type, shape, size in bytes, and SHA-256 of its bytes."""

    suffix: str
    dtype_tag: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class StoredGram:
    """A Gram in a file.

    Attributes:
        leader: the first of the modules that share it; its tensors are called after it.
        names: all of them.
        in_features: width of their input.
        token_count: tokens that were counted. With none there are no tensors.
        tensors: what is stored, in the order of the bytes.
        damping, damping_used, precision_bits: of the inverse, see `GramDiagonal`; None for a triangle.
    """

    leader: str
    names: tuple[str, ...]
    in_features: int
    token_count: int
    tensors: tuple[StoredTensor, ...]
    damping: float | None = None
    damping_used: float | None = None
    precision_bits: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoredGram:
        """From `to_dict`'s values, as JSON gives them back."""
        tensors = tuple(StoredTensor(**{**item, "shape": tuple(item["shape"])}) for item in values["tensors"])
        return cls(**{**values, "names": tuple(values["names"]), "tensors": tensors})


def header_room(names: Iterable[str], provenance: Mapping[str, Any]) -> int:
    """Bytes to keep free for the header of a file with Grams of these modules, whatever inputs they share."""
    text = len(json.dumps(provenance))
    # JSON within JSON doubles quotes and backslashes; a name stands in at most four places.
    room = 4096 + 2 * text + sum(4 * len(name.encode()) + 1024 for name in names)
    if room > MOST_HEADER_BYTES:
        raise ValueError(f"provenance: expected a header of at most {MOST_HEADER_BYTES} bytes, got about {room}")
    return room - room % 8


class GramWriter:
    """Writes Grams into a file in the order in which they come.

    Args:
        path: the file; without `finished` it must not exist.
        form: "triangle" (the Gram itself) or "inverse_diagonal" (`GramDiagonal`).
        room: bytes of the header, from `header_room`.
        finished: Grams that an earlier writer has written; what follows them in the file is cut off.

    Until `finish` the file has no header and nothing takes it for a Gram file.
    """

    def __init__(self, path: Path, form: str, room: int, finished: Sequence[StoredGram] = ()) -> None:
        if form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        self.path = path
        self.form = form
        self.stored = list(finished)
        self._room = room
        self._end = _LENGTH_BYTES + room + sum(gram.nbytes for gram in finished)
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if finished else os.O_CREAT | os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o666)
        try:
            size = os.fstat(self._descriptor).st_size
            if finished and size < self._end:
                raise CheckpointError(f"{path}: expected at least {self._end} bytes of finished Grams, found {size}")
            os.ftruncate(self._descriptor, self._end)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GramWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; without `finish` it stays without a header."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add(self, names: Sequence[str], gram: Gram | GramDiagonal) -> StoredGram:
        """Write the Gram that the modules `names` share, the first one being its leader."""
        counted = gram.token_count > 0
        details: dict[str, Any] = {}
        tensors: list[StoredTensor] = []
        start = self._end
        try:
            if counted and self.form == "triangle":
                tensors.append(self._add_triangle(names[0], gram))
            elif counted:
                if not isinstance(gram, GramDiagonal):
                    raise TypeError(f"{names[0]}: expected a GramDiagonal, got {type(gram).__name__}")
                tensors.append(self._add_tensor(names[0], "inverse_diagonal", gram.sum_inverse))
                tensors.append(self._add_tensor(names[0], "dead", gram.dead))
                details = {key: getattr(gram, key) for key in ("damping", "damping_used", "precision_bits")}
        except BaseException:
            self._end = start
            raise
        stored = StoredGram(names[0], tuple(names), gram.in_features, gram.token_count, tuple(tensors), **details)
        self.stored.append(stored)
        return stored

    def sync(self) -> None:
        """Have everything so far on the disk."""
        os.fdatasync(self._descriptor)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the header, sync and close: the file is complete."""
        header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(self._summary(provenance))}}
        offset = 0
        for gram in self.stored:
            for tensor in gram.tensors:
                header[f"{gram.leader}.{tensor.suffix}"] = {
                    "dtype": tensor.dtype_tag,
                    "shape": list(tensor.shape),
                    "data_offsets": [offset, offset + tensor.nbytes],
                }
                offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise ValueError(f"provenance: the header takes {len(text)} bytes, {self._room} were kept free for it")
        contents = bytearray(struct.pack("<Q", self._room) + text + b" " * (self._room - len(text)))
        os.ftruncate(self._descriptor, self._end)
        write_fully(self._descriptor, memoryview(contents), 0, self.path, "the header")
        os.fsync(self._descriptor)
        self.close()

    def _summary(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        grams = {}
        for gram in self.stored:
            values = gram.to_dict()
            del values["leader"]
            values["sha256"] = {tensor["suffix"]: tensor["sha256"] for tensor in values.pop("tensors")}
            grams[gram.leader] = {key: value for key, value in values.items() if value is not None}
        return {"version": FORMAT_VERSION, "form": self.form, "grams": grams, "provenance": dict(provenance)}

    def _add_triangle(self, leader: str, gram: Gram) -> StoredTensor:
        if not isinstance(gram, Gram):
            raise TypeError(f"{leader}: expected a Gram, got {type(gram).__name__}")
        gram.check_finite()
        digest = hashlib.sha256()
        start = self._end
        for piece in triangle_strips(gram.state_dict()["sum"]):
            self._append(piece, leader, digest)
        shape = (triangle_length(gram.in_features),)
        return StoredTensor("triangle", "F32", shape, self._end - start, digest.hexdigest())

    def _add_tensor(self, leader: str, suffix: str, tensor: Tensor) -> StoredTensor:
        digest = hashlib.sha256()
        start = self._end
        self._append(tensor.detach().cpu().contiguous(), leader, digest)
        return StoredTensor(suffix, dtype_tag(tensor.dtype), tuple(tensor.shape), self._end - start, digest.hexdigest())

    def _append(self, tensor: Tensor, leader: str, digest: Any) -> None:
        contents = tensor_bytes(tensor)
        try:
            write_fully(self._descriptor, contents, self._end, self.path, f"the Gram of {leader}")
        except OSError as error:
            if error.errno == errno.EBADF:
                raise ValueError(f"{self.path}: the writer is closed") from error
            raise
        digest.update(contents)
        self._end += len(contents)
