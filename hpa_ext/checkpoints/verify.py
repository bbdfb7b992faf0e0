"""Whether an output is what it was when it was written, and kept what it says it kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.digest import file_sha256
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import PARTIAL
from hpa_ext.checkpoints.header import read_header
from hpa_ext.checkpoints.journal import JOURNAL_FILE
from hpa_ext.checkpoints.manifest import MANIFEST_FILE, output_files, read_manifest
from hpa_ext.checkpoints.masks import MASKS_FILE
from hpa_ext.checkpoints.progress import ByteProgress
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.retained import OldWeights, compare_retained
from hpa_ext.checkpoints.shard_files import INDEX_FILE, WEIGHTS_FILE

_HASHING_THREADS = 4


@dataclass
class VerifyReport:
    """What `verify_checkpoint` found.

    Attributes:
        path: what was verified.
        problems: one line for each; none means that all is as it should be.
        notes: what could not be checked, or is merely worth knowing.
        files, nbytes: how much was compared with the manifest's hashes.
        tensors: how many tensors the readable headers hold.
        retained_columns: how many were found bit-identical to the old model's; None if not compared.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    nbytes: int = 0
    tensors: int = 0
    retained_columns: int | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"ok": self.ok, **values, "path": str(self.path)}

    def __str__(self) -> str:
        lines = [f"problem: {text}" for text in self.problems] + [f"note: {text}" for text in self.notes]
        counts = f"{self.files} files, {self.nbytes} bytes, {self.tensors} tensors"
        if self.retained_columns is not None:
            counts += f", {self.retained_columns} retained columns compared with the old model"
        verdict = "verified" if self.ok else f"{len(self.problems)} PROBLEMS"
        return "\n".join([*lines, f"{self.path}: {verdict}: {counts}"])


def verify_checkpoint(
    path: str | os.PathLike[str],
    old: str | os.PathLike[str] | None = None,
    progress: bool = True,
    old_adapters: Sequence[str | os.PathLike[str]] = (),
) -> VerifyReport:
    """Check an output against its manifest: sizes, SHA-256 of every file, headers, the index, nothing unfinished.

    Args:
        path: the output directory, a Gram file, or another safetensors file, of which only the header can be checked.
        old: the model on disk before the step; the columns that ``hpa_masks.safetensors`` calls retained are then
            compared with it, bit by bit.
        progress: show on the terminal how far it is, if standard error is one.
        old_adapters: directories of adapters that belong to the old model, in the order of the steps.

    Returns:
        The problems found; a problem does not raise.

    Raises:
        OSError: `path` or `old` does not exist or cannot be read.
        CheckpointError: `old` is no checkpoint, or an adapter does not fit it.
        ValueError: `old_adapters` without `old`.
    """
    path = Path(path)
    os.stat(path)
    if old_adapters and old is None:
        raise ValueError("old_adapters: expected none without an old model, got some")
    report = VerifyReport(path)
    if not path.is_dir():
        if not _check_weights(path, report):
            report.notes.append("a single file: its header was checked, there is nothing to compare its contents with")
        if old is not None:
            report.problems.append("expected an output directory to compare with the old model, got a file")
        return report
    present = output_files(path)
    _check_finished(path, present, report)
    manifest = _manifest(path, report)
    if manifest is not None:
        _check_files(path, manifest["files"], present, report, progress)
    for name in present:
        if name.endswith(".safetensors"):
            _check_weights(path / name, report)
    if INDEX_FILE in present or WEIGHTS_FILE in present:
        _caught(report, lambda: CheckpointReader(path).close())
    if old is not None:
        with OldWeights(old, old_adapters) as weights:
            _check_retained(path, weights, manifest, present, report, progress)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _check_finished(path: Path, present: list[str], report: VerifyReport) -> None:
    unfinished = [name for name in present if name.endswith(PARTIAL)]
    if JOURNAL_FILE in present or path.name.endswith(PARTIAL):
        report.problems.append(f"{path}: an unfinished output; go on with it by --resume")
    elif unfinished:
        report.problems.append(f"{path / unfinished[0]}: an unfinished file ({len(unfinished)} in all)")


def _manifest(path: Path, report: VerifyReport) -> dict[str, Any] | None:
    if not (path / MANIFEST_FILE).exists():
        report.problems.append(f"{path}: no {MANIFEST_FILE}; without it only the headers can be checked")
        return None
    found: list[dict[str, Any]] = []
    _caught(report, lambda: found.append(read_manifest(path)))
    return found[0] if found else None


def _check_files(
    path: Path, files: Mapping[str, Any], present: list[str], report: VerifyReport, progress: bool
) -> None:
    """Sizes and hashes; several files at a time, because hashing is slower than reading."""
    with ByteProgress("verifying", sum(record["size"] for record in files.values()), progress) as shown:

        def check(name: str) -> str | None:
            return _check_file(path / name, files[name], shown.add)

        with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as threads:
            report.problems += [problem for problem in threads.map(check, files) if problem]
    report.files = len(files)
    report.nbytes = sum(record["size"] for record in files.values())
    for name in present:
        if name not in files and name not in (MANIFEST_FILE, JOURNAL_FILE) and not name.endswith(PARTIAL):
            message = f"{path / name}: not in the manifest"
            (report.problems if name.endswith(".safetensors") else report.notes).append(message)


def _check_file(path: Path, record: Mapping[str, Any], progress: Callable[[int], None]) -> str | None:
    try:
        size = os.stat(path).st_size
        if size != record["size"]:
            return f"{path}: expected {record['size']} bytes by the manifest, found {size}"
        digest, _ = file_sha256(path, progress)
    except FileNotFoundError:
        return f"{path}: in the manifest, but absent"
    except (OSError, CheckpointError) as error:
        return str(error)
    if digest != record["sha256"]:
        return f"{path}: expected SHA-256 {record['sha256']} by the manifest, found {digest}: the contents changed"
    return None


def _check_weights(path: Path, report: VerifyReport) -> bool:
    """Check a header and, in a Gram file, the hashes in it; whether there were any."""

    def check() -> None:
        nonlocal has_hashes
        shard, descriptor = read_header(path)
        os.close(descriptor)
        report.tensors += len(shard.entries)
        if METADATA_KEY in shard.metadata:
            with GramFile(path) as grams:
                report.problems += grams.problems()
            has_hashes = True

    # Grams import the reader's package, so it does not import them.
    from hpa_ext.checkpoints.gram_file import GramFile
    from hpa_ext.checkpoints.gram_writer import METADATA_KEY

    has_hashes = False
    _caught(report, check)
    return has_hashes


def _check_retained(
    path: Path,
    old: OldWeights,
    manifest: Mapping[str, Any] | None,
    present: list[str],
    report: VerifyReport,
    progress: bool,
) -> None:
    if MASKS_FILE not in present:
        report.problems.append(f"{path}: no {MASKS_FILE}, so there is nothing to compare with the old model")
        return
    inputs = (manifest or {}).get("inputs", {})
    if inputs.get("old", old.reader.fingerprint()) != old.reader.fingerprint():
        report.problems.append(f"{old.reader.path}: not the old model that the output was made from")
    if inputs.get("old_adapters", old.adapters) != old.adapters:
        report.problems.append(
            f"{path}: expected the {len(inputs['old_adapters'])} adapters of the old model that it was made from, "
            f"got {len(old.adapters)}, or others"
        )

    def compare() -> None:
        problems, report.retained_columns = compare_retained(path, old, progress)
        report.problems += problems

    _caught(report, compare)


def _caught(report: VerifyReport, check: Callable[[], None]) -> None:
    """Run a check; what it raises about the files becomes a problem."""
    try:
        check()
    except (OSError, CheckpointError) as error:
        report.problems.append(str(error))
