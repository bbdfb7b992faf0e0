"""Where a record of a data file is: its errors, and the files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hpa_ext.data.conversations import Picture


class RecordError(ValueError):
    """A record of a data file is not what it should be; the message names file, record and key."""


@dataclass(frozen=True)
class RecordPlace:
    """Where a record is, for messages, and the folder of its images."""

    path: Path
    number: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.path}: record {self.number}"

    def error(self, key: str, expected: str, came: Any) -> RecordError:
        """What is wrong with a key of the record."""
        return RecordError(f"{self}: {key}: expected {expected}, got {came!r:.200}")

    def identity(self, record: Mapping[str, Any]) -> str:
        """The record's own id, or ``#number``."""
        value = record.get("id")
        return f"#{self.number}" if value is None or value == "" else str(value)

    def risk_class(self, record: Mapping[str, Any]) -> str | None:
        """The record's risk class, if it names one."""
        value = record.get("risk_class")
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise self.error("risk_class", "a text", value)
        return value

    def picture(self, name: Any, key: str) -> Picture:
        """The picture that a path in the record names, or that the record holds itself."""
        if not isinstance(name, (str, Path)):
            if hasattr(name, "convert") and hasattr(name, "tobytes"):  # PIL, as the datasets library decodes images
                return Picture(name, key)
            raise self.error(key, "the path of an image", name)
        name = str(name)
        if not name or "\0" in name:
            raise self.error(key, "the path of an image", name)
        if "://" in name:
            raise self.error(key, "the path of a file (nothing is downloaded)", name)
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).is_absolute():
            raise self.error(key, f"a path inside {self.folder}", name)
        full = self.folder / pure
        if not full.is_file():
            raise FileNotFoundError(f"{self}: {key}: no such image: {full}")
        return Picture(full, name)
