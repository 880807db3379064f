"""Corpora of any number of pairs as one stream of tokens.

A prefix names what the list ``PREFIX.shards`` holds (:mod:`shard_list`), or, without one,
the pair ``PREFIX.bin``/``.idx``. Opening costs the same for one shard and for 100,000: pairs are opened when
they are read, and then checked against the list.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from megatron_iiet.data.corpora.indexed import IndexedDataset, TokenStream
from megatron_iiet.data.corpora.mmididx import (
    DocumentIndex,
    Int64Array,
    TokenFile,
    bin_path,
    idx_path,
    shards_path,
)
from megatron_iiet.data.corpora.shard_list import ShardList

MAX_OPEN_SHARDS = 256  # a shard costs up to two file descriptors, and 1024 is a common limit

T = TypeVar("T")


def open_corpus(prefix: str | os.PathLike[str]) -> ShardedDataset | IndexedDataset:
    """The corpus ``prefix``: what its list ``PREFIX.shards`` names, else the pair ``PREFIX.bin``/``.idx``.

    The name of one of these files will do as well.

    Raises:
        ValueError: neither is there, or what is there is damaged.
    """
    prefix = corpus_prefix(prefix)
    return ShardedDataset(prefix) if shards_path(prefix).exists() else IndexedDataset(prefix)


def corpus_prefix(path: str | os.PathLike[str]) -> str:
    """The prefix of the corpus that ``path``, a prefix or the name of a file of it, belongs to."""
    prefix, ending = os.path.splitext(os.fspath(path))
    return prefix if ending in (".shards", ".bin", ".idx") and os.path.isfile(path) else os.fspath(path)


class OpenShard:
    """The files of one entry of a list, checked against the list; the ``.idx`` when first asked for."""

    def __init__(self, shards: ShardList, index: int) -> None:
        self._list = shards
        self.listed = shards[index]
        self.prefix = shards.prefix_of(self.listed)
        self._index: DocumentIndex | None = None
        self.tokens = self._open(bin_path, lambda path: TokenFile(path, shards.dtype))
        num_bytes = self.listed.tokens * shards.dtype.itemsize
        self._require("bytes", self.tokens.path, self.tokens.num_bytes, num_bytes)

    @property
    def index(self) -> DocumentIndex:
        """The pair's index, opened at the first call."""
        if self._index is None:
            index = self._open(idx_path, DocumentIndex)
            self._require("documents", index.path, index.num_documents, self.listed.documents)
            self._require("tokens", index.path, index.num_tokens, self.listed.tokens)
            self._require("token type", index.path, index.dtype, self._list.dtype)
            self._index = index
        return self._index

    def _open(self, name: Callable[[str], Path], open_file: Callable[[Path], T]) -> T:
        path = name(self.prefix)
        try:
            return open_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ValueError(
                f"{path} is missing, and {self._list.path} names it; put it back, or make the corpus again."
            ) from None

    def _require(self, what: str, path: Path, found: object, listed: object) -> None:
        if found != listed:
            raise ValueError(
                f"{path} does not belong to {self._list.path}: {what} by the list: {listed}, in the file: "
                f"{found}; restore the file, or make the corpus again."
            )


class ShardedDataset(TokenStream):
    """All pairs of a list in its order.

    At most ``max_open_shards`` pairs are held open, the ones read last. Safe to read from many threads.

    Raises:
        ValueError: the list is damaged; when reading, a file is missing or is not the one that was listed.
    """

    def __init__(self, prefix: str | os.PathLike[str], max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self.prefix = os.fspath(prefix)
        self.shards = ShardList(shards_path(self.prefix))
        self.dtype = self.shards.dtype
        self.info = self.shards.info
        self.num_tokens, self.num_documents = self.shards.num_tokens, self.shards.num_documents
        self._max_open = max_open_shards
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def pairs(self) -> Iterator[OpenShard]:
        """All pairs in order, opened one by one."""
        return map(self.open_shard, range(len(self.shards)))

    def document_start(self, document: int) -> int:
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        if document == self.num_documents:
            return self.num_tokens
        shard = bisect_right(self.shards.document_ends, document) - 1
        index = self._index(shard)
        first = self.shards.document_ends[shard]
        return self.shards.token_ends[shard] + index.document_start(document - first)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        self.check_range(start, stop)
        found = []
        for shard, first, begin, end in self._parts(start, stop):
            starts = self._index(shard).document_starts(begin - first, end - first)
            starts += first
            found.append(starts)
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *found])

    def read_into(self, start: int, out: Int64Array) -> None:
        stop = start + len(out)
        if not 0 <= start <= stop <= self.num_tokens:
            self.check_range(start, stop)
        for shard, first, begin, end in self._parts(start, stop):
            self._shard(shard).tokens.read_into(begin - first, out[begin - start : end - start])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The range [start, stop) by shards: (shard, its first position, begin and end of the part in it)."""
        ends = self.shards.token_ends
        shard = bisect_right(ends, start) - 1
        while start < stop:
            end = min(stop, ends[shard + 1])
            yield shard, ends[shard], start, end
            shard, start = shard + 1, end

    def _shard(self, index: int) -> OpenShard:
        with self._lock:
            shard = self._open.get(index)
            if shard is not None:
                self._open.move_to_end(index)
                return shard
        shard = self.open_shard(index)  # not under the lock: a slow disk must not hold up other threads
        with self._lock:
            self._open[index] = shard
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return shard

    def _index(self, index: int) -> DocumentIndex:
        shard = self._shard(index)
        return self._sparingly(lambda: shard.index)

    def open_shard(self, index: int) -> OpenShard:
        """Open one shard; whoever reads tokens need not ask for it."""
        return self._sparingly(lambda: OpenShard(self.shards, index))

    def _sparingly(self, open_file: Callable[[], T]) -> T:
        """Open something; where too many files are open, let go of ours and try once more."""
        try:
            return open_file()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        with self._lock:
            self._open.clear()
        return open_file()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedDataset, (self.prefix, self._max_open)  # other processes open the files anew
