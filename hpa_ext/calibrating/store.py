"""The unfinished Gram file of a calibration and the journal of what is in it, from which a later run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.files import fsync_path
from hpa_ext.checkpoints.gram_file import reduced
from hpa_ext.checkpoints.gram_writer import GramWriter, StoredGram
from hpa_ext.checkpoints.journal import JOURNAL_FILE, Journal
from hpa_ext.checkpoints.output import partial_directory
from hpa_ext.gram import GramCollection
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.interrupts import interrupt_held_back
from hpa_ext.processes import Processes

_FILE = "grams.safetensors"


class GramStore:
    """Takes Grams a layer at a time, and becomes the Gram file at the end.

    Everything lies in ``<out>.partial`` until it is complete. Only the first process writes; the others follow.

    Args:
        out: the Gram file to make.
        identity: what decides its contents; another one is refused on resume.
        form, damping: see `save_grams`.
        room: bytes to keep free for the header.
        resume: go on with an earlier run; begins anew if there is none.

    Attributes:
        finished: names of the modules whose Grams are written.
        directory: for other files that a run needs until it is finished.

    Raises:
        FileExistsError: `out` is there, or an unfinished one is and `resume` is False.
        CheckpointError: the unfinished one was begun with another identity; lists the differences.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        form: str,
        damping: float,
        room: int,
        resume: bool,
        processes: Processes,
    ) -> None:
        self.directory = partial_directory(out)
        self._out = Path(os.path.abspath(out))
        self._form = form
        self._damping = damping
        self._processes = processes
        self._journal: Journal | None = None
        self._writer: GramWriter | None = None
        self.finished: set[str] = processes.once(lambda: self._open(identity, room, resume))

    def add(self, key: str, grams: GramCollection) -> None:
        """Write the Grams of one piece of work, and note that it is finished."""
        groups: dict[str, list[str]] = {}
        leader_of = {id(gram): leader for leader, gram in grams.distinct().items()}
        for name, gram in grams.items():
            groups.setdefault(leader_of[id(gram)], []).append(name)
        forms = self._reduced(grams, list(groups))
        self._processes.once(lambda: self._write(key, groups, forms))
        self.finished.update(grams)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Complete the file, give it its name and remove everything else."""
        self._processes.once(lambda: self._publish(provenance))

    def close(self) -> None:
        """Give up the lock and the files, finished or not."""
        if self._writer is not None:
            self._writer.close()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> GramStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, key: str, groups: Mapping[str, list[str]], forms: Mapping[str, Any]) -> None:
        assert self._writer is not None and self._journal is not None
        stored = [self._writer.add(names, forms[leader]) for leader, names in groups.items()]
        self._writer.sync()
        self._journal.append(key, {"grams": [gram.to_dict() for gram in stored]})

    def _publish(self, provenance: Mapping[str, Any]) -> None:
        assert self._writer is not None and self._journal is not None
        self._writer.finish(provenance)
        if os.path.lexists(self._out):
            raise FileExistsError(f"{self._out}: appeared meanwhile; the result is {self.directory / _FILE}")
        with interrupt_held_back():
            os.rename(self.directory / _FILE, self._out)
            fsync_path(self._out.parent)
            self._journal.close()
            shutil.rmtree(self.directory)

    def _open(self, identity: Mapping[str, Any], room: int, resume: bool) -> set[str]:
        if os.path.lexists(self._out):
            raise FileExistsError(f"{self._out}: expected a new file; remove it or choose another name")
        journal_path = self.directory / JOURNAL_FILE
        if journal_path.exists() and not resume:
            raise FileExistsError(
                f"{self.directory}: an unfinished calibration lies there; go on with resume=True (--resume), "
                "or remove the directory"
            )
        if journal_path.exists():
            self._journal = Journal.resume(journal_path, identity)
        else:
            self.directory.mkdir(exist_ok=True)
            self._journal = Journal.create(journal_path, identity)
        try:
            pieces: Sequence[Mapping[str, Any]] = list(self._journal.finished.values())
            stored = [StoredGram.from_dict(gram) for piece in pieces for gram in piece["grams"]]
            self._writer = GramWriter(self.directory / _FILE, self._form, room, stored)
            return {name for gram in stored for name in gram.names}
        except (KeyError, TypeError) as error:
            self._journal.close()
            raise CheckpointError(f"{journal_path}: expected the journal of a calibration: {error!r}") from error
        except BaseException:
            self._journal.close()
            raise

    def _reduced(self, grams: GramCollection, leaders: list[str]) -> dict[str, Any]:
        """The Grams in the form of the file; the inverses are divided among the processes."""
        forms: dict[str, Any] = {}
        divided = self._form == "inverse_diagonal"

        def reduce_mine() -> None:
            for position, leader in enumerate(leaders):
                if not divided or position % self._processes.count == self._processes.rank:
                    forms[leader] = reduced(leader, grams[leader], self._form, self._damping)
                    if isinstance(forms[leader], GramDiagonal):
                        forms[leader] = forms[leader].to("cpu")

        self._processes.together(reduce_mine)
        if divided and self._processes.count > 1:
            for one in self._processes.gather(forms):
                forms.update(one)
        return forms
