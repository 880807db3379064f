"""Where pairs are made, and which files may be replaced: those that were made there, told by their content.

A name tells nothing of who made a file, and neither does a plan to make it: between a run that failed and the
next one somebody else may have taken the name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from megatron_iiet.data.corpora.mmididx import file_digest
from megatron_iiet.data.corpora.shard_list import ShardList
from megatron_iiet.data.stores import size_of
from megatron_iiet.durable import write_text

_NOTE = ".made"


class Identity(NamedTuple):
    """A file that was made."""

    size: int
    digest: str  # in hexadecimal digits
    changed: int = 0  # nanoseconds of its last change, which spares reading it; 0: not known


def listed(path: Path) -> Iterator[Identity]:
    """The pairs that a shard list names; nothing where it is none."""
    with suppress(ValueError, OSError):
        shards = ShardList(path)
        for shard in map(shards.__getitem__, range(len(shards))):
            index = size_of(f"{shards.prefix_of(shard)}.idx")
            yield Identity(shard.tokens * shards.dtype.itemsize, shard.bin_digest.hex())
            yield Identity(index or 0, shard.idx_digest.hex())


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())


class Making:
    """A folder of files that are being made, with a note of each pair from before it gets its names.

    A note outlives a kill, so what was published and nowhere recorded is known.
    """

    def __init__(self, folder: Path, recorded: Callable[[], Iterable[Identity]] = tuple) -> None:
        """``recorded``: what was made earlier; asked for when something is in the way."""
        self.folder, self._recorded = folder, recorded

    def partial(self, target: Path) -> Path:
        """Where a file is written that is to become ``target``.

        Raises:
            ValueError: from there it could not take that name in one step.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refuse_elsewhere(target)
        return self.folder / f"{target.parent.name}-{target.name}.partial"

    def refuse_elsewhere(self, target: Path) -> None:
        """Raise a ValueError where ``target`` is on another file system, as far as its folders are there."""
        folder, made_in = map(_nearest_folder, (target, self.folder / target.name))
        if folder.stat().st_dev != made_in.stat().st_dev:
            raise ValueError(
                f"{folder} is on another file system than {made_in}, where {target.name} is written first; "
                "have both on one, or choose another output."
            )

    def _note(self, target: Path) -> Path:
        return self.folder / f"{target.parent.name}-{target.name}{_NOTE}"

    def note(self, target: Path, files: Iterable[Identity]) -> None:
        """Write down what ``target`` and the like are about to be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._note(target), json.dumps(list(files)))

    def forget(self, target: Path) -> None:
        """Remove a note: what it says is recorded now."""
        self._note(target).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove notes and what killed runs left, and the folder unless something else is in it."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            for path in self.folder.iterdir():
                if path.suffix in (".partial", _NOTE):
                    path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    @cached_property
    def known(self) -> frozenset[Identity]:
        """Everything that was made here, when it was first asked for."""
        found = set(self._recorded())
        for note in self.folder.glob(f"*{_NOTE}"):
            try:
                found.update(Identity(*entry) for entry in json.loads(note.read_bytes()))
            except (ValueError, TypeError):
                raise ValueError(f"{note} is no note of what was made; move it away.") from None
        return frozenset(found)

    def made(self, path: Path) -> bool:
        """Whether a file was made here; a list, whether a shard that it names was."""
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return False
        if path.suffix == ".shards":
            digests = {entry.digest for entry in self.known}
            return any(entry.digest in digests for entry in listed(path))
        alike = [entry for entry in self.known if entry.size == status.st_size]
        if any(entry.changed == status.st_mtime_ns for entry in alike):
            return True
        return bool(alike) and file_digest(path).hex() in {entry.digest for entry in alike}

    def remove(self, path: Path) -> None:
        """Remove a file if it was made here."""
        if os.path.lexists(path) and self.made(path):
            path.unlink(missing_ok=True)

    def refuse_foreign(self, *paths: Path) -> None:
        """Raise a ValueError where one of these is there and was not made here."""
        for path in paths:
            if os.path.lexists(path) and not self.made(path):
                raise ValueError(
                    f"{path} is there already, and by its content was not made for this output; choose "
                    "another output, or move it away."
                )
