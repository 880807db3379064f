"""Copies of a run's checkpoints on another file system, made by a thread of the main rank: object stores and
whatever else fsspec knows. Until a checkpoint is copied, retention leaves it where it is."""

from __future__ import annotations

import queue
import re
import secrets
import threading
from pathlib import Path

from megatron_iiet.config import ConfigError
from megatron_iiet.storage.checkpoint import LATEST, STATE, read_state
from megatron_iiet.storage.retention import MIRRORED, PINNED, REJECTED, mark, reason_of


class Mirror:
    """One place for the checkpoints of one run."""

    def __init__(self, url: str) -> None:
        """``url``: of a folder, as fsspec has it: ``s3://bucket/run``, ``gs://…``, ``file:///…``.

        Raises:
            ConfigError: there is no such place, or nothing can be written there.
        """
        if not re.match(r"[a-z][a-z0-9+.-]*://.", url):
            raise ConfigError(
                f"checkpoint.mirror is {url}, which is no URL; write s3://bucket/run, or file:///path for a "
                "folder"
            )
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(url)
            probe = f"{self._root}/.probe-{secrets.token_hex(8)}"
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(probe, b"")
            self._fs.rm_file(probe)
        except Exception as error:  # of whatever library is behind it
            raise ConfigError(
                f"checkpoint.mirror is {url}, where nothing can be written ({error}); install the library "
                "that fsspec asks for, give it access, or choose another place"
            ) from None
        self.url = url
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._told: queue.Queue[str] = queue.Queue()
        self._given: set[Path] = set()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def give(self, folder: Path) -> None:
        """Have a checkpoint copied, unless it was, or is waiting."""
        if folder not in self._given and reason_of(folder, MIRRORED) != self.url:
            self._given.add(folder)
            self._waiting.put(folder)

    def told(self) -> list[str]:
        """What there is to say since the last time: a sentence for each copy that failed; it is tried again
        when the checkpoint is given again."""
        return [self._told.get_nowait() for _ in range(self._told.qsize())]

    def finish(self) -> list[str]:
        """Wait for all copies; see :meth:`told`."""
        self._waiting.put(None)
        self._thread.join()
        return self.told()

    def _run(self) -> None:
        while (folder := self._waiting.get()) is not None:
            try:
                save = read_state(folder).save
                self._copy(folder)
                if read_state(folder).save == save:  # a run that went back may have saved anew meanwhile
                    mark(folder, MIRRORED, self.url)
            except Exception as error:  # of whatever library is behind it
                if folder.is_dir():  # else it was written anew, or somebody has removed it
                    self._told.put(f"{folder} was not copied to {self.url}: {str(error) or repr(error)}")
            self._given.discard(folder)

    def _copy(self, folder: Path) -> None:
        """The state last: what has one is complete there as here."""
        there = f"{self._root}/{folder.name}"
        if self._fs.exists(f"{there}/{STATE}"):
            self._fs.rm_file(f"{there}/{STATE}")
        self._fs.makedirs(there, exist_ok=True)
        names = {path.name for path in folder.iterdir() if path.is_file()} - {
            PINNED,
            REJECTED,
            MIRRORED,
            STATE,
        }
        for name in (*sorted(names), STATE):
            self._fs.put_file(str(folder / name), f"{there}/{name}")
        self._fs.pipe_file(f"{self._root}/{LATEST}", f"{folder.name}\n".encode())
