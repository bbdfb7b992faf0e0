"""Gram files: Grams by module name in one safetensors file, read one at a time."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import fsync_path
from hpa_ext.checkpoints.gram_writer import FORMAT_VERSION, FORMS, METADATA_KEY, GramWriter, header_room
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.triangle import fill_from_triangle, triangle_length
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection
from hpa_ext.gram_diagonal import GramDiagonal

_DIGEST_BYTES = 16 << 20


class GramFile(Mapping[str, "Gram | GramDiagonal"]):
    """The Grams in a file, by module name; each is read when it is asked for.

    Args:
        path: a file that `save_grams`, `calibrate_checkpoint` or ``hpa-ext calibrate`` wrote.
        device: where the Grams shall be.

    Attributes:
        form: "triangle" (full Grams; items are `Gram`) or "inverse_diagonal" (items are `GramDiagonal`).
        groups: ``{leader: names}``: the modules that share one Gram, by the first of them.
        provenance: what it was made from: model, adapters, data, seed, token mask, versions.

    Modules of one group give the same object as long as it is alive; the last one that was asked for is kept. A Gram of
    no tokens is an empty `Gram` in either form.

    Raises:
        OSError: the file is absent or cannot be read.
        CheckpointError: it is no Gram file, or is incomplete.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self._reader = CheckpointReader(self.path)
        summary = self._summary()
        self.form: str = summary["form"]
        self.provenance: dict[str, Any] = summary["provenance"]
        self._about: dict[str, dict[str, Any]] = summary["grams"]
        self.groups: dict[str, list[str]] = {leader: list(about["names"]) for leader, about in self._about.items()}
        self._leader_of = {name: leader for leader, names in self.groups.items() for name in names}
        for leader in self.groups:
            self._check(leader)
        self._alive: weakref.WeakValueDictionary[str, Gram | GramDiagonal] = weakref.WeakValueDictionary()
        self._last: Gram | GramDiagonal | None = None

    def __getitem__(self, name: str) -> Gram | GramDiagonal:
        leader = self._leader_of[name]
        gram = self._alive.get(leader)
        if gram is None:
            self._last = None  # before the next one is read: there is never more than one here
            gram = self._read(leader)
            self._alive[leader] = gram
        self._last = gram
        return gram

    def __iter__(self) -> Iterator[str]:
        return iter(self._leader_of)

    def __len__(self) -> int:
        return len(self._leader_of)

    def __contains__(self, name: object) -> bool:
        return name in self._leader_of

    def in_features(self, name: str) -> int:
        """Width of a module's input, without reading its Gram."""
        return int(self._about[self._leader_of[name]]["in_features"])

    def token_count(self, name: str) -> int:
        """Tokens that were counted for a module, without reading its Gram."""
        return int(self._about[self._leader_of[name]]["token_count"])

    def damping(self, name: str) -> float | None:
        """The damping that a module's inverse was computed with; None for a full Gram, which takes any."""
        return self._about[self._leader_of[name]].get("damping")

    def nbytes(self, name: str) -> int:
        """Bytes of a module's Gram in memory, without reading it."""
        width = self.in_features(name)
        return 4 * width * width if self.form == "triangle" else 5 * width

    def fingerprint(self) -> str:
        """Of what the file says about itself, the SHA-256 of every tensor included: equal files, equal fingerprints."""
        return hashlib.sha256(self._reader.shards[0].metadata[METADATA_KEY].encode()).hexdigest()

    def problems(self) -> Iterator[str]:
        """Read everything and say what differs from the SHA-256 that was recorded when it was written."""
        for leader, about in self._about.items():
            for suffix, expected in about["sha256"].items():
                entry = self._reader.entry(f"{leader}.{suffix}")
                digest = hashlib.sha256()
                for start in range(0, entry.nbytes, _DIGEST_BYTES):
                    piece = bytearray(min(_DIGEST_BYTES, entry.nbytes - start))
                    self._reader.read_into(entry, start, memoryview(piece))
                    digest.update(piece)
                if digest.hexdigest() != expected:
                    yield f"{self.path}: {entry.name}: expected SHA-256 {expected}, got {digest.hexdigest()}"

    def forget(self) -> None:
        """Let go of the Gram that was asked for last, so that its memory is free before the next one is read."""
        self._last = None

    def close(self) -> None:
        """Close the file; Grams that were read stay."""
        self._reader.close()

    def __enter__(self) -> GramFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GramFile({str(self.path)!r}: {len(self)} modules, {len(self.groups)} Grams, {self.form})"

    def _read(self, leader: str) -> Gram | GramDiagonal:
        about = self._about[leader]
        if about["token_count"] == 0:
            return Gram(about["in_features"], device=self.device)
        if self.form == "triangle":
            total = torch.empty((about["in_features"],) * 2, dtype=torch.float32)
            name = f"{leader}.triangle"
            fill_from_triangle(total, lambda start, stop: self._reader.read_rows(name, start, stop))
            return Gram.of_sum(total.to(self.device), about["token_count"])
        try:
            return GramDiagonal(
                sum_inverse=self._reader.read(f"{leader}.inverse_diagonal"),
                dead=self._reader.read(f"{leader}.dead"),
                **{key: about[key] for key in ("token_count", "damping", "damping_used", "precision_bits")},
            ).to(self.device)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {leader}: {error}") from error

    def _summary(self) -> dict[str, Any]:
        text = self._reader.shards[0].metadata.get(METADATA_KEY) if len(self._reader.shards) == 1 else None
        if text is None:
            raise CheckpointError(f"{self.path}: expected a Gram file, got tensors without {METADATA_KEY!r} metadata")
        try:
            summary = json.loads(text)
            version = summary["version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(f"{self.path}: expected Gram file format {FORMAT_VERSION}, got {version!r}")
            if summary["form"] not in FORMS:
                raise CheckpointError(f"{self.path}: expected the form {' or '.join(FORMS)}, got {summary['form']!r}")
            for about in summary["grams"].values():
                _ = about["names"], about["sha256"], int(about["in_features"]), int(about["token_count"])
            _ = summary["provenance"].keys()
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: {METADATA_KEY!r} metadata is damaged: {error!r}") from error
        return summary

    def _check(self, leader: str) -> None:
        """Raise unless the tensors of a group are there, with the shapes that its width asks for."""
        about = self._about[leader]
        width = about["in_features"]
        expected = {"triangle": ("F32", (triangle_length(width),))}
        if self.form == "inverse_diagonal":
            expected = {"inverse_diagonal": ("F32", (width,)), "dead": ("BOOL", (width,))}
        for suffix, (tag, shape) in expected.items() if about["token_count"] else ():
            entry = self._reader.entry(f"{leader}.{suffix}")
            if (entry.dtype_tag, entry.shape) != (tag, shape):
                came = f"{entry.dtype_tag} {list(entry.shape)}"
                raise CheckpointError(f"{self.path}: {entry.name}: expected {tag} {list(shape)}, got {came}")


def save_grams(
    grams: GramCollection,
    path: str | os.PathLike[str],
    provenance: Mapping[str, Any] | None = None,
    reduce: str | None = None,
    damping: float = 0.01,
) -> None:
    """Write Grams into a safetensors file, to be read with `GramFile`.

    Args:
        grams: as `calibrate` returns them.
        path: the file, ending in ``.safetensors``; replaced if it exists.
        provenance: what they were made from; anything that JSON can hold.
        reduce: None for the Grams (the upper triangle, ``2 in (in + 1)`` bytes each), "diagonal" for the diagonals of
            their inverses alone (``5 in`` bytes each), which is all that HPA needs.
        damping: of the inverses; HPA must then be run with the same.

    Raises:
        TypeError, ValueError: an argument is off, or a name cannot be one of a tensor.
        NumericalError: an activation was not finite, or a Gram could not be factored; `module` names it.
        OSError: the file cannot be written.

    The file is complete or not there: it is written under another name, synced and renamed.
    """
    if not isinstance(grams, GramCollection):
        raise TypeError(f"grams: expected a GramCollection as calibrate returns it, got {type(grams).__name__}")
    form = check_reduce(reduce)
    path = check_gram_path(path)
    provenance = dict(provenance or {})
    names_of = {id(gram): [] for gram in grams.values()}
    for name, gram in grams.items():
        names_of[id(gram)].append(name)
    partial = path.with_name(path.name + ".writing")
    try:
        with GramWriter(partial, form, header_room(grams, provenance)) as writer:
            for leader, gram in grams.distinct().items():
                writer.add(names_of[id(gram)], reduced(leader, gram, form, damping))
            writer.finish(provenance)
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def reduced(leader: str, gram: Gram, form: str, damping: float) -> Gram | GramDiagonal:
    """A Gram in the form in which it is stored. Raises NumericalError with the name of its leader."""
    if gram.token_count == 0:
        return gram
    try:
        if form == "inverse_diagonal":
            return GramDiagonal.of(gram, damping)
        gram.check_finite()
        return gram
    except NumericalError as error:
        raise error.in_module(leader) from error


def check_reduce(reduce: str | None) -> str:
    """The form of a file for the caller's `reduce`."""
    if reduce not in (None, "diagonal"):
        raise ValueError(f"reduce: expected None or 'diagonal', got {reduce!r}")
    return "inverse_diagonal" if reduce else "triangle"


def check_gram_path(path: str | os.PathLike[str]) -> Path:
    """The path of a Gram file to be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a file name that ends in .safetensors, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a directory")
    return path
