"""Files by path or url, read at any place by any number of threads; urls are whatever fsspec knows.

No object of a store is kept: asynchronous ones break after a fork, and fsspec has the one of this process for
a url at hand.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

READ_BYTES = 1 << 22
"""Read at once where the whole of a file is."""
BLOCK_BYTES = 1 << 17
"""Of a url, read and kept at once: a request takes as long for a window of some kilobytes."""
BLOCKS_KEPT = 512
"""Of all urls together, in every process: 64 MiB."""
_DIRECT_BYTES = 8 * BLOCK_BYTES  # from here on one request is better than blocks that push out others

Stamp = tuple[int, str]
"""Size of a file, and what its store changes with the content."""

_FIXED = re.compile(r"@[0-9a-f]{40}/")  # a revision of the Hugging Face hub


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a name is one for fsspec."""
    return "://" in os.fspath(path)


def store_of(url: str) -> tuple[Any, str]:
    """The file system behind a url, and the name that the file has there.

    Raises:
        Exception: of whatever kind the library has.
    """
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url)
    return store, str(path)


def reason_of(error: Exception) -> str:
    """An error's text in one line of bearable length, and for a package that is missing what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        text += ": pip install 'megatron-iiet[remote]', or the package alone"
    return text if len(text) <= 300 else text[:297] + "..."


def stamp_of(url: str, entry: Mapping[str, Any]) -> Stamp:
    """A file's size and its tag in its store's words: Hugging Face's, S3's and others', else a time.

    Raises:
        ValueError: the store does not tell the size.
    """
    if entry.get("size") is None:
        raise ValueError(f"the size of {url} is not told by its server; copy it to a local folder")
    names = ("blob_id", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    return int(entry["size"]), next((str(entry[name]) for name in names if entry.get(name)), "unknown")


@contextmanager
def reading(url: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns a store's errors into sentences; those ``passing`` stay.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    try:
        yield
    except passing:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} is missing.") from None
    except Exception as error:  # every store has its own kinds
        raise OSError(
            f"{url} cannot be read ({reason_of(error)}); check its name and your access, or run again when "
            "it can."
        ) from error


def size_of(path: str) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        OSError: of a url, this cannot be told.
    """
    if is_url(path):
        found = _stamp(path)
        return None if found is None else found[0]
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_folder(path: str) -> bool:
    """Whether there is a folder of that name.

    Raises:
        OSError: of a url, this cannot be told.
    """
    if not is_url(path):
        return os.path.isdir(path)
    with reading(path):
        store, name = store_of(path)
        return bool(store.isdir(name))


def open_file(path: str | os.PathLike[str], seen: dict[str, Stamp] | None = None) -> LocalFile | RemoteFile:
    """Open a file for reading.

    Args:
        seen: stamps that urls had when they were opened before, which is added to.

    Raises:
        ValueError: it is another one than was seen.
        OSError: it is missing, or cannot be read.
    """
    name = os.fspath(path)
    return RemoteFile(name, seen) if is_url(name) else LocalFile(name)


class LocalFile:
    """A file of this machine.

    Reads are calls to pread, not accesses to a memory map: they cost the same (the conversion of tokens to
    int64 takes most of either), and a file cut short meanwhile gives a sentence instead of SIGBUS.
    """

    _descriptor = -1

    def __init__(self, name: str) -> None:
        self.name = name
        self._descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        self.size = status.st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before."""
        data = os.pread(self._descriptor, stop - start, start)
        while len(data) < stop - start:
            more = os.pread(self._descriptor, stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def map(self) -> mmap.mmap:
        """The file in memory; not of one that is empty."""
        return mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # The last reference closes, so a cache may drop a file that another thread still reads.
        if self._descriptor >= 0:
            close(self._descriptor)


class RemoteFile:
    """A file behind a url: blocks of it are fetched when they are read, and some kept."""

    def __init__(self, url: str, seen: dict[str, Stamp] | None = None) -> None:
        self.name = url
        found = _stamp(url)
        if found is None:
            raise FileNotFoundError(f"{url} is missing.")
        self._stamp = found if seen is None else seen.setdefault(url, found)
        _require(url, self._stamp, found)
        self.size = found[0]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before.

        Raises:
            ValueError: the file has changed since it was opened.
            OSError: it cannot be read.
        """
        stop = min(stop, self.size)
        if stop - start >= min(_DIRECT_BYTES, self.size):
            return _fetch(self.name, self._stamp, start, stop)
        first = start // BLOCK_BYTES
        numbers = range(first, -(-stop // BLOCK_BYTES))
        blocks = [_block(self.name, self._stamp, number) for number in numbers]
        return b"".join(blocks)[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def map(self) -> mmap.mmap:
        """The file in memory, by a copy on disk that has no name and goes with the map."""
        with tempfile.TemporaryFile() as copy:
            for start in range(0, self.size, READ_BYTES):
                copy.write(self.read(start, start + READ_BYTES))
            copy.flush()
            return mmap.mmap(copy.fileno(), self.size, access=mmap.ACCESS_READ)


@lru_cache(BLOCKS_KEPT)
def _block(url: str, stamp: Stamp, number: int) -> bytes:
    start = number * BLOCK_BYTES
    return _fetch(url, stamp, start, min(start + BLOCK_BYTES, stamp[0]))


def _fetch(url: str, stamp: Stamp, start: int, stop: int) -> bytes:
    """Bytes of a file that is the same after they were read."""
    data, failure = b"", None
    try:
        with reading(url):
            store, path = store_of(url)
            data = bytes(store.cat_file(path, start=start, end=stop))
    except OSError as error:
        failure = error
    if failure or not _FIXED.search(url):
        _require(url, stamp, _stamp(url))
    if failure:
        raise failure
    if len(data) != stop - start:
        raise OSError(
            f"{url} gave {len(data)} of its bytes [{start}, {stop}); run again when it can be read."
        )
    return data


def _stamp(url: str) -> Stamp | None:
    """Size and tag as the store has them now; None where there is no such file."""
    try:
        with reading(url):
            store, path = store_of(url)
            store.invalidate_cache(store._parent(path))
            entry = store.info(path)
            return None if entry["type"] == "directory" else stamp_of(url, entry)
    except FileNotFoundError:
        return None


def _require(url: str, before: Stamp, now: Stamp | None) -> None:
    if now != before:
        is_now = "is gone" if now is None else "has {:,} bytes and the tag {}".format(*now)
        raise ValueError(
            f"{url} {is_now}, but had {before[0]:,} bytes and the tag {before[1]} when it was opened: it was "
            "changed since; restore it, or make the corpus again under another name."
        )
