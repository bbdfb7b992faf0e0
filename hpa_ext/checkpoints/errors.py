"""What is wrong with files, as opposed to with numbers or with the call."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, an index, a journal or a manifest is not what it should be; the message names the file.

    That a file is absent, cannot be opened or cannot be written raises the `OSError` of the system instead.
    """
