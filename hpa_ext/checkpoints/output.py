"""An output directory that is complete or absent: filled under another name, renamed when all of it is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import PARTIAL, fsync_path
from hpa_ext.checkpoints.identity import refuse_difference
from hpa_ext.checkpoints.journal import JOURNAL_FILE, Journal
from hpa_ext.checkpoints.manifest import MANIFEST_FILE, manifest_identity, read_manifest


def partial_directory(out: str | os.PathLike[str]) -> Path:
    """Where the output `out` is gathered: ``<out>.partial`` beside it."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + PARTIAL)


def check_output(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse an output directory that could not be published, before any work.

    Args:
        out: must not exist, or be an empty directory; its parent must exist and be writable.
        inputs: files and directories that are read; the output may not be one of them, or lie inside one.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError, NotADirectoryError, PermissionError: of the parent.
        ValueError: it is, or lies in, an input, or cannot be renamed (a mount point, a symlink, the root).
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or os.path.ismount(out) or out.name == "":
        raise ValueError(f"out: expected the name of a new directory, got {out}: a symlink or a mount point")
    if out.exists():
        if not out.is_dir():
            raise FileExistsError(errno.EEXIST, "out: expected a new directory, got a file", str(out))
        held = sorted(os.listdir(out))
        if held:
            raise FileExistsError(
                errno.EEXIST, f"out: expected a new or empty directory, got one that holds {held[0]!r}", str(out)
            )
    parent = out.parent
    if not parent.exists():
        raise FileNotFoundError(errno.ENOENT, "out: expected its parent directory to exist", str(parent))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "out: expected its parent to be a directory", str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "out: expected to be allowed to write beside it", str(parent))
    real = parent.resolve() / out.name
    for source in inputs:
        resolved = Path(source).resolve()
        if real == resolved or resolved in real.parents:
            raise ValueError(f"out: expected a directory outside the inputs, got {out} in {source}")


def begin_output(
    out: str | os.PathLike[str],
    identity: Mapping[str, Any],
    *,
    resume: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Journal:
    """Make ``<out>.partial``, or go on with it, and open its journal, which locks it.

    Args:
        out: the output, as for `check_output`.
        identity: of the run, as `hpa_ext.checkpoints.identity.identity` makes it.
        resume: go on with an unfinished output of this identity; where there is none, begin one.
        inputs: as for `check_output`.

    Returns:
        The journal; what it lists as finished need not be done again.

    Raises:
        FileExistsError: there is an unfinished output, and `resume` is False.
        CheckpointError: the unfinished output was begun with something else (each difference is listed), is damaged,
            or another process is working on it.
        OSError, ValueError: as `check_output`.
    """
    check_output(out, inputs)
    partial = partial_directory(out)
    if partial.exists() and os.listdir(partial):
        if not resume:
            message = "an unfinished output is there: resume it, or remove it"
            raise FileExistsError(errno.EEXIST, message, str(partial))
        if (partial / JOURNAL_FILE).exists():
            return Journal.resume(partial / JOURNAL_FILE, identity)
        held = sorted(os.listdir(partial))[0]
        raise CheckpointError(f"{partial}: expected {JOURNAL_FILE} to resume by, got none beside {held!r}: remove it")
    partial.mkdir(exist_ok=True)
    fsync_path(partial.parent)
    return Journal.create(partial / JOURNAL_FILE, identity)


def publish(partial: str | os.PathLike[str], out: str | os.PathLike[str], journal: Journal | None = None) -> None:
    """Make the gathered files the output: all on the disk, the journal removed, the directory renamed.

    Killed at any moment this leaves the unfinished directory, for `finished_output` to go on with, or the output.

    Args:
        partial: the directory with everything, the manifest included.
        out: the output.
        journal: that of the run, removed and closed.

    Raises:
        CheckpointError: an unfinished file is still there, or no manifest.
        FileExistsError: meanwhile something else has appeared at `out`; the result stays in `partial`.
    """
    partial, out = Path(partial), Path(os.path.abspath(out))  # as `check_output` and `partial_directory` read it
    if not (partial / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{partial}: expected {MANIFEST_FILE} before publishing, got none")
    for directory, _, names in os.walk(partial):
        for name in names:
            if name.endswith(PARTIAL):
                raise CheckpointError(f"{Path(directory) / name}: expected no unfinished file before publishing")
            fsync_path(Path(directory) / name)
        fsync_path(Path(directory))
    _require_free(partial, out)
    if journal is not None:
        journal.delete()
        fsync_path(partial)
    try:
        os.rename(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _require_free(partial, out)
        raise
    finally:
        if journal is not None:
            journal.close()
    fsync_path(out.parent)


def finished_output(out: str | os.PathLike[str], identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of an output that needs no more work, None if there is none.

    That is one that is published already, or one whose run was killed between its last write and the renaming, which
    is then done here.

    Raises:
        CheckpointError: it was made from other inputs or settings; lists each differing key.
    """
    out, partial = Path(os.path.abspath(out)), partial_directory(out)
    if (out / MANIFEST_FILE).is_file():
        return _same(out, identity)
    if not (partial / MANIFEST_FILE).is_file() or (partial / JOURNAL_FILE).exists():
        return None
    manifest = _same(partial, identity)
    publish(partial, out)
    return manifest


def _same(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(directory)
    refuse_difference(manifest_identity(manifest), identity, f"{directory}")
    return manifest


def _require_free(partial: Path, out: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not os.listdir(out)):
        raise FileExistsError(
            errno.EEXIST,
            f"expected nothing, or an empty directory, at the output; the result is in {partial}",
            str(out),
        )
