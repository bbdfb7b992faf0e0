"""What an output consists of, and what it was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.digest import file_sha256
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import PARTIAL, read_json, write_atomically
from hpa_ext.checkpoints.identity import FORMAT_VERSION
from hpa_ext.checkpoints.journal import JOURNAL_FILE

MANIFEST_FILE = "hpa_manifest.json"

_IDENTITY_KEYS = ("format", "kind", "inputs", "config", "versions")


def write_manifest(
    directory: str | os.PathLike[str],
    identity: Mapping[str, Any],
    report: Any = None,
    digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write ``hpa_manifest.json`` for everything that lies in a directory, and have it on the disk.

    Args:
        directory: with all its files finished.
        identity: as `hpa_ext.checkpoints.identity.identity` makes it.
        report: what was done, layer by layer, as plain values.
        digests: SHA-256 by file name where it is known already; the other files are read.

    Returns:
        The manifest: the identity's keys, ``created_by``, ``files`` (``size`` and ``sha256`` by relative name) and
        ``report``.

    Raises:
        CheckpointError: an unfinished file lies there.
    """
    directory, digests = Path(directory), digests or {}
    names = output_files(directory)
    unfinished = [name for name in names if name.endswith(PARTIAL) and name != MANIFEST_FILE + PARTIAL]
    if unfinished:
        raise CheckpointError(f"{directory / unfinished[0]}: expected no unfinished file when writing the manifest")
    unknown = sorted(set(digests) - set(names))
    if unknown:
        raise ValueError(f"digests: expected names of files in {directory}, got {unknown[0]!r}")
    files = {}
    for name in names:
        if name in (MANIFEST_FILE, MANIFEST_FILE + PARTIAL, JOURNAL_FILE):
            continue
        path = directory / name
        digest, size = (digests[name], path.stat().st_size) if name in digests else file_sha256(path)
        files[name] = {"size": size, "sha256": digest}
    created_by = f"hpa_ext {identity['versions']['hpa_ext']}"
    manifest = {**identity, "created_by": created_by, "files": files, "report": report}
    write_atomically(directory / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an output.

    Raises:
        FileNotFoundError: it has none.
        CheckpointError: it is damaged, of a later format, or names files outside the directory.
    """
    path = Path(directory) / MANIFEST_FILE
    manifest = read_json(path)
    absent = [key for key in (*_IDENTITY_KEYS, "files") if key not in manifest]
    if absent:
        raise CheckpointError(f"{path}: expected the key {absent[0]!r}, got none")
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format {FORMAT_VERSION}, got {manifest['format']!r}")
    files = manifest["files"]
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: expected sizes and hashes by file under 'files', got {files!r:.100}")
    for name, record in files.items():
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise CheckpointError(f"{path}: expected files inside the directory, got {name!r}")
        if (
            not isinstance(record, dict)
            or type(record.get("size")) is not int
            or not isinstance(record.get("sha256"), str)
        ):
            raise CheckpointError(f"{path}: expected size and sha256 of {name!r}, got {record!r:.100}")
    return manifest


def manifest_identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the run that wrote the output."""
    return {key: manifest[key] for key in _IDENTITY_KEYS}


def output_files(directory: Path) -> list[str]:
    """Relative names of all files in a directory and below, sorted, hidden ones excepted."""
    found = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [str((Path(parent) / name).relative_to(directory)) for name in names if not name.startswith(".")]
    return sorted(found)
