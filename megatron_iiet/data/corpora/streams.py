"""A corpus as a stream of tokens cut into documents: a pair ``.bin``/``.idx``, or any number of them.

A prefix names what the list ``PREFIX.shards`` holds (:mod:`shard_list`), or, without one, the pair
``PREFIX.bin``/``.idx`` (:mod:`mmididx`). Pairs are opened when they are read, and then checked against the
list. Prefixes are paths or urls (:mod:`stores`).
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from megatron_iiet.data.corpora.mmididx import DocumentIndex, Int64Array, TokenFile
from megatron_iiet.data.corpora.shard_list import ShardList
from megatron_iiet.data.stores import Stamp, is_folder, is_url, size_of

MAX_OPEN_SHARDS = 256  # a shard costs up to two file descriptors, and 1024 is a common limit

T = TypeVar("T")


def open_corpus(prefix: str | os.PathLike[str]) -> ShardedDataset | IndexedDataset:
    """The corpus ``prefix``: what its list ``PREFIX.shards`` names, else the pair ``PREFIX.bin``/``.idx``.

    The name of one of these files will do as well.

    Raises:
        ValueError: neither is there, or what is there is damaged.
        OSError: a file cannot be read.
    """
    prefix = corpus_prefix(prefix)
    has_list = size_of(f"{prefix}.shards") is not None
    return ShardedDataset(prefix) if has_list else IndexedDataset(prefix)


def corpus_prefix(path: str | os.PathLike[str]) -> str:
    """The prefix of the corpus that ``path``, a prefix or the name of a file of it, belongs to."""
    path = os.fspath(path)
    prefix, ending = os.path.splitext(path)
    return prefix if ending in (".shards", ".bin", ".idx") and size_of(path) is not None else path


class TokenStream(ABC):
    """What training reads: one long row of tokens, cut into documents. Safe to read from many threads.

    Reads raise IndexError outside the corpus and ValueError where a file turns out to be damaged.
    """

    prefix: str  # names the corpus
    dtype: np.dtype[Any]  # of the stored tokens
    num_tokens: int  # of all documents
    num_documents: int

    @abstractmethod
    def document_start(self, document: int) -> int:
        """Position in the stream of the first token of ``document``; ``num_documents`` gives the end."""

    @abstractmethod
    def document_starts(self, start: int, stop: int) -> Int64Array:
        """Positions p, start <= p < stop, where a document starts: int64, ascending, each once."""

    @abstractmethod
    def read_into(self, start: int, out: Int64Array) -> None:
        """Fill ``out``, int64 [n], with tokens [start, start + n) of the stream."""

    def read(self, start: int, stop: int) -> Int64Array:
        """Tokens [start, stop) of the stream, int64 [stop - start]."""
        self.check_range(start, stop)
        out = np.empty(stop - start, dtype=np.int64)
        self.read_into(start, out)
        return out

    def document(self, index: int) -> Int64Array:
        """Tokens of one document, int64 [tokens]."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        start, stop = self.document_start(index), self.document_start(index + 1)
        if start > stop:
            raise ValueError(
                f"{self.prefix} is damaged: document {index} starts at token {start} and ends at {stop}; "
                "restore its .idx or make it again."
            )
        return self.read(start, stop)

    def check_range(self, start: int, stop: int) -> None:
        """Refuse a range of tokens that leaves the stream (IndexError)."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"range [{start}, {stop}) leaves the {self.num_tokens} tokens of {self.prefix}")


class IndexedDataset(TokenStream):
    """The pair ``prefix``. Opening takes the same time for 1 MB and 1 TB.

    Raises:
        ValueError: a file is missing, empty, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        bin_file, idx_file = f"{self.prefix}.bin", f"{self.prefix}.idx"
        _require_file(idx_file, bin_file)
        _require_file(bin_file, idx_file)
        self.index = DocumentIndex(idx_file)
        self.dtype = self.index.dtype
        self.tokens = TokenFile(bin_file, self.dtype)
        if self.tokens.num_bytes != self.index.num_bytes:
            raise ValueError(
                f"{idx_file} does not belong to {os.path.basename(bin_file)}: the index describes "
                f"{self.index.num_bytes} bytes of tokens, the file holds {self.tokens.num_bytes}; make the "
                "pair again with tools/preprocess_data.py."
            )
        self.num_tokens, self.num_documents = self.index.num_tokens, self.index.num_documents
        self.info: dict[str, Any] = {}  # a list would hold what the maker said of the corpus,
        self.listed = None  # and an entry for the pair

    def pairs(self) -> Iterator[IndexedDataset]:
        """The one pair of this corpus."""
        yield self

    def document_start(self, document: int) -> int:
        return self.index.document_start(document)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        self.check_range(start, stop)
        return self.index.document_starts(start, stop)

    def read_into(self, start: int, out: Int64Array) -> None:
        self.check_range(start, start + len(out))
        self.tokens.read_into(start, out)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)  # other processes open the files anew


def _require_file(path: str, partner: str) -> None:
    size, prefix = size_of(path), os.path.splitext(path)[0]
    if size is None:
        if size_of(partner) is not None:
            hint = (
                f"its partner {os.path.basename(partner)} is there, so the writing did not finish: make the "
                "pair again"
            )
        elif is_folder(prefix):
            hint = (
                f"{prefix} is a folder without a list {os.path.basename(prefix)}.shards beside it: if "
                "preprocessing wrote it, run the same command again, it was not finished"
            )
        else:
            hint = "data.prefix is the path without .bin/.idx; make the pair with tools/preprocess_data.py"
        raise ValueError(f"{path} is missing; {hint}.")
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); make the pair again with tools/preprocess_data.py.")


class OpenShard:
    """The files of one entry of a list, checked against the list; the ``.idx`` when first asked for, and that
    of a url, which is read anyway, with its digest. ``seen`` as :func:`.open_file` has it."""

    def __init__(self, shards: ShardList, index: int, seen: dict[str, Stamp] | None = None) -> None:
        self._list, self._seen = shards, seen
        self.listed = shards[index]
        self.prefix = shards.prefix_of(self.listed)
        self._index: DocumentIndex | None = None
        self.tokens = self._open(".bin", lambda path: TokenFile(path, shards.dtype, seen))
        num_bytes = self.listed.tokens * shards.dtype.itemsize
        self._require("bytes", self.tokens.path, self.tokens.num_bytes, num_bytes)

    @property
    def index(self) -> DocumentIndex:
        """The pair's index, opened at the first call."""
        if self._index is None:
            index = self._open(".idx", lambda path: DocumentIndex(path, self._seen))
            self._require("documents", index.path, index.num_documents, self.listed.documents)
            self._require("tokens", index.path, index.num_tokens, self.listed.tokens)
            self._require("token type", index.path, index.dtype, self._list.dtype)
            if is_url(index.path):
                self._require("digest", index.path, index.digest().hex(), self.listed.idx_digest.hex())
            self._index = index
        return self._index

    def _open(self, ending: str, open_file: Callable[[str], T]) -> T:
        path = f"{self.prefix}{ending}"
        try:
            return open_file(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ValueError(
                f"{path} is missing, and {self._list.path} names it; put it back, or make the corpus again."
            ) from None

    def _require(self, what: str, path: str, found: object, listed: object) -> None:
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
        self.shards = ShardList(f"{self.prefix}.shards")
        self.dtype = self.shards.dtype
        self.info = self.shards.info
        self.num_tokens, self.num_documents = self.shards.num_tokens, self.shards.num_documents
        self._max_open = max_open_shards
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._seen: dict[str, Stamp] = {}  # urls, as they were when they were first opened
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
        found = [
            self._index(shard).document_starts(begin - first, end - first) + first
            for shard, first, begin, end in self._parts(start, stop)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *found])

    def read_into(self, start: int, out: Int64Array) -> None:
        stop = start + len(out)
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
        return self._sparingly(lambda: OpenShard(self.shards, index, self._seen))

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
