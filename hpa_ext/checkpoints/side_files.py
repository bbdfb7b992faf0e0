"""What lies beside the weights and belongs to the model: configuration, tokenizer, processor, templates, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import mistaken_for, open_regular, read_exactly

_WANTED = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.md",
    "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
_UNWANTED = (
    ".*", "*.index.json", "*.partial", "hpa_*", "adapter_config.json", "trainer_state.json", "training_args*",
    "optimizer*", "scheduler*", "rng_state*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors",
)  # fmt: skip

_TEMPLATES = "additional_chat_templates"
"""The one directory that transformers writes beside a model: further chat templates."""


def side_files(directory: Path) -> list[Path]:
    """Configuration, tokenizer, processor, templates, vocabulary, licence and model card in a directory, by name.

    Never weights, indices, pickles, the state of a trainer or an optimizer, code, hidden files, an adapter's
    configuration, or what this package wrote beside an earlier result. Of the subdirectories only the ``*.jinja`` in
    ``additional_chat_templates/`` count.
    """
    names = [name for name in sorted(os.listdir(directory)) if _belongs(name)]
    found = [directory / name for name in names if (directory / name).is_file()]
    return found + sorted(path for path in (directory / _TEMPLATES).glob("*.jinja") if path.is_file())


def copy_side_files(files: Sequence[Path], source: Path, target: Path) -> list[Path]:
    """Copy files that lie under the directory `source` to the same places under `target`.

    Returns:
        The copies. A file that is there already is written anew; contents and permission bits are copied, times not.

    Raises:
        OSError: a file cannot be read or written.
        CheckpointError: one of them is a Git LFS pointer or something else that only has the file's name.
    """
    copies = []
    for file in files:
        _refuse_placeholder(file)
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
        copy.chmod(0o644)
        copies.append(copy)
    return copies


def _belongs(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _WANTED) and not any(
        fnmatchcase(name, pattern) for pattern in _UNWANTED
    )


def _refuse_placeholder(file: Path) -> None:
    """A pointer in place of the tokenizer would surface only when somebody uses the result."""
    descriptor = open_regular(file)
    try:
        start = bytearray(min(512, os.fstat(descriptor).st_size))
        read_exactly(descriptor, memoryview(start), 0, file, "the file")
    finally:
        os.close(descriptor)
    mistaken = mistaken_for(bytes(start))
    if mistaken and file.suffix != ".md":
        raise CheckpointError(f"{file}: expected the file itself, got {mistaken}")
