"""Files that are there whole and on disk, or not at all: what a kill or a power cut must not spoil."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # what file systems without fsync answer


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file under a temporary name, which takes the place of ``path`` once it is whole and on disk.

    Several processes, on one node or many, may replace the same file at once: the last one wins.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:
            yield file
            sync_file(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block, a write that found no room says to which file, and how much room there is."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, f"{os.strerror(error.errno)}, {free:,} bytes free", str(path)) from None


_UNFINISHED = ".being_written"
"""Marks a folder that a process of this package has begun."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a temporary name, which becomes ``folder`` once it is whole, or is gone; what a
    killed process left under that name goes.

    Raises:
        ValueError: something else is there under that name.
    """
    partial = folder.with_name(folder.name + ".partial")
    marker = partial / _UNFINISHED
    if marker.is_file() and not partial.is_symlink():
        shutil.rmtree(partial)
    with suppress(OSError):
        partial.rmdir()  # killed before it had its marker
    if os.path.lexists(partial):
        raise ValueError(
            f"{partial}, where {folder} would be written first, is there and not left by such a writing "
            f"(it has no {_UNFINISHED}); move it away, or choose another name."
        )
    partial.mkdir(parents=True)
    marker.touch()
    try:
        yield partial
        partial.rename(folder)
        (folder / _UNFINISHED).unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """``os.open`` for a file that is this program's own: it is written through no link that is put in its
    place. One that is only appended to may have a second name, as backups give it.

    Raises:
        ValueError: that is what is there.
    """
    try:
        # For reading as well: to open a pipe for writing alone would wait for its reader.
        handle = os.open(path, os.O_RDWR | flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found = "a symbolic link"
    else:
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and (status.st_nlink <= 1 or flags & os.O_APPEND):
            return handle
        os.close(handle)
        found = "a second name of another file" if stat.S_ISREG(status.st_mode) else "no regular file"
    raise ValueError(f"{os.fspath(path)} is {found}, which is not written through; remove it.")


def write_text(path: Path, text: str) -> None:
    """Replace a file's text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace a file's content."""
    with replacing(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, in one write, and put it on disk; half a line that a crash left before it stays a
    line of its own."""
    with naming(path), path.open("ab+", buffering=0) as file:
        torn = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + line.encode() + b"\n")
        sync_file(file)
    sync_folder(path.parent)


def check_output(path: Path) -> None:
    """Refuse a file that has no place, before the work that ends in writing it; missing folders are no
    obstacle, see :func:`make_parent`.

    Raises:
        ValueError: it is a url, a part of its path is a file, or no folder may be made there.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{path} is a url, but outputs are written to local folders; write there, then copy."
        )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is a file, not a folder; choose another output.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {above} is not writable; choose another output.")


def make_parent(path: Path) -> None:
    """Make the folders that a file goes into, where they are missing.

    Raises:
        ValueError: as :func:`check_output`.
    """
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def sync_file(file: IO[bytes]) -> None:
    """Put everything written to a file on disk, where its file system can."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a new name in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Terminated(SystemExit):
    """SIGTERM has come."""


def leave_cleanly_on_sigterm() -> None:
    """From now on SIGTERM leaves this process through the clean-up of what it had begun, with status 143:
    by :class:`Terminated`.

    A second signal, a parent's after that to the whole group, does not cut the clean-up short.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated(143)

    signal.signal(signal.SIGTERM, leave)
