"""Writes pairs ``.bin``/``.idx``: digested on the way, whole under their names or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.making import Identity, Making
from megatron_iiet.data.corpora.mmididx import (
    BLOCK_ENTRIES,
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    DigestedFile,
    Shard,
    bin_path,
    check_prefix,
    idx_path,
    shards_path,
    token_dtype,
)
from megatron_iiet.durable import make_parent, open_own, sync_file, sync_folder

_SPOOL_BYTES = 1 << 20  # lengths beyond this go to disk

TokenArray = npt.NDArray[np.integer[Any]]


class PairWriter:
    """The two files of a pair under temporary names: in the folder of ``making`` or, without one,
    ``PREFIX.bin.partial`` and ``PREFIX.idx.partial``.

    A context manager: leaving it removes every trace of what was not published. A killed run leaves those
    files, no reader looks at them, and the next run overwrites them.

    Raises:
        ValueError: the prefix is a folder's name or has no place, another process writes it, or what is there
            was not made by ``making``; without one it is replaced whosever it is.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], dtype: np.dtype[Any], making: Making | None = None
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype, self._making = dtype, making
        check_prefix(self.prefix)
        self._targets = [bin_path(prefix), idx_path(prefix)]
        make_parent(self._targets[0])
        if making is not None:
            making.refuse_foreign(*self._targets, shards_path(prefix))
        self._partials = [
            path.with_name(path.name + ".partial") if making is None else making.partial(path)
            for path in self._targets
        ]
        self.bin = DigestedFile(_open_locked(self._partials[0]))
        try:
            index = open_own(self._partials[1], os.O_CREAT)
        except BaseException:
            self.bin.file.close()
            raise
        os.truncate(index, 0)
        self.idx = DigestedFile(os.fdopen(index, "wb"))

    def publish(self, documents: int) -> Shard:
        """Give both files their names; a list and an index of an earlier run go first.

        They must never describe the new bytes, not even between two renames or after a power cut.
        """
        sync_file(self.bin.file)
        sync_file(self.idx.file)
        folder, stale = self._targets[0].parent, [shards_path(self.prefix), self._targets[1]]
        if self._making is not None:
            files = (Identity(file.num_bytes, file.digest.hex()) for file in (self.bin, self.idx))
            self._making.note(self._targets[0], files)
            self._making.refuse_foreign(*self._targets, *stale)
        if any(path.exists() for path in stale):
            for path in stale:
                path.unlink(missing_ok=True)
            sync_folder(folder)
        for partial, target in zip(self._partials, self._targets, strict=True):
            partial.rename(target)
        sync_folder(folder)
        self._close()
        return Shard(
            name=os.path.basename(self.prefix),
            tokens=self.bin.num_bytes // self.dtype.itemsize,
            documents=documents,
            bin_digest=self.bin.digest,
            idx_digest=self.idx.digest,
        )

    def discard(self) -> None:
        """Remove what was written; published pairs stay."""
        if not self.bin.file.closed:
            for path in self._partials:  # before closing: the lock covers the names
                path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        for output in (self.idx, self.bin):
            with contextlib.suppress(OSError):  # a full disk, again, for bytes that nobody needs any more
                output.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.discard()


def write_index(
    out: DigestedFile,
    dtype: np.dtype[Any],
    num_sequences: int,
    num_documents: int,
    lengths: Callable[[], Iterable[npt.NDArray[Any]]],
    first_sequences: Iterable[npt.NDArray[Any]],
) -> None:
    """Write an ``.idx`` in constant memory.

    Args:
        dtype: type of the tokens.
        lengths: gives the tokens of every sequence, int [num_sequences] in blocks; called twice.
        first_sequences: first sequence of every document, int [num_documents] in blocks.
    """
    out.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], num_sequences, num_documents + 1))
    for block in lengths():
        out.write(block.astype("<i4"))
    start = 0
    for block in lengths():
        ends = start + np.cumsum(block, dtype="<i8") * dtype.itemsize
        out.write(ends - block.astype("<i8") * dtype.itemsize)
        start = int(ends[-1])
    for block in first_sequences:
        out.write(block.astype("<i8"))
    out.write(np.array([num_sequences], dtype="<i8"))


class IndexedDatasetWriter(PairWriter):
    """Writes a pair, document by document, in constant memory.

    Leaving the context normally publishes the pair and sets ``shard``.

    Raises:
        ValueError: the prefix has no place, another process is writing the prefix, an id is outside
            [0, vocab_size), or no document was added.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int, making: Making | None = None) -> None:
        super().__init__(prefix, token_dtype(vocab_size), making)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self.num_documents = 0
        self.shard: Shard | None = None  # once it is published, by the file name of the prefix
        folder = str(self._targets[0].parent)
        self._lengths = SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=folder)  # noqa: SIM115 closed with the pair

    def add_document(self, tokens: TokenArray) -> None:
        """Append one document: ids [tokens]."""
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: TokenArray, lengths: npt.ArrayLike) -> None:
        """Append consecutive documents: ids [sum(lengths)] and their lengths in tokens, int [documents]."""
        self.add_blocks((np.asarray(tokens),), lengths)

    def add_blocks(self, blocks: Iterable[TokenArray], lengths: npt.ArrayLike) -> None:
        """The same with the ids in blocks, which are held one at a time. After an error the writer is of no
        more use."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size and (lengths.min() < 1 or lengths.max() >= 2**31):
            raise ValueError(
                f"A document of {lengths.min()} to {lengths.max()} tokens does not fit {self.prefix}: "
                "the format holds 1 to 2147483647; skip empty documents, cut giant ones."
            )
        added = 0
        for ids in blocks:
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
                raise ValueError(
                    f"Token ids {ids.min()} to {ids.max()} leave the vocabulary [0, {self.vocab_size}); "
                    "tokenizer and vocab_size do not belong together."
                )
            self.bin.write(np.ascontiguousarray(ids, dtype=self.dtype))
            added += ids.size
        if lengths.sum() != added:
            raise ValueError(f"{added} tokens do not fill documents of {lengths.sum()} tokens in all.")
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_tokens += added
        self.num_documents += lengths.size

    def close(self) -> Shard:
        """Publish the pair. The caller writes its ``.shards`` (:func:`shard_list.write_shards`) last."""
        if self.shard is None:
            if not self.num_documents:
                raise ValueError(f"No documents for {self.prefix}: there is nothing to write.")
            starts = range(0, self.num_documents, BLOCK_ENTRIES)
            write_index(
                self.idx,
                self.dtype,
                self.num_documents,
                self.num_documents,
                self._length_blocks,
                (np.arange(at, min(at + BLOCK_ENTRIES, self.num_documents)) for at in starts),
            )
            self.shard = self.publish(self.num_documents)
        return self.shard

    def _length_blocks(self) -> Iterator[npt.NDArray[Any]]:
        self._lengths.seek(0)
        while data := self._lengths.read(BLOCK_ENTRIES * 4):
            yield np.frombuffer(data, dtype="<i4")

    def discard(self) -> None:
        super().discard()
        self._lengths.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


def _open_locked(path: Path) -> IO[bytes]:
    """Open for writing, emptied, unless another process holds it."""
    while True:
        file = os.fdopen(open_own(path, os.O_CREAT), "wb")
        if not lock(file):
            file.close()
            raise ValueError(f"{path} is being written by another process; choose another output prefix.")
        # Between the two calls its writer may have published the file: then it bears another name by now.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()


def lock(file: IO[bytes], wait: bool = False) -> bool:
    """Take an open file for this process alone; whether that worked. Let go when the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # file systems without locks: keeping others out is a courtesy
    return True
