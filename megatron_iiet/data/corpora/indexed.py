"""A corpus as a stream of tokens cut into documents, and the pair ``.bin``/``.idx`` as such a corpus.

The format is described in :mod:`mmididx`, corpora of many pairs in :mod:`shards`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.mmididx import DocumentIndex, Int64Array, TokenFile, bin_path, idx_path


class TokenStream(ABC):
    """What training reads: one long row of tokens, cut into documents. Safe to read from many threads.

    Reads raise IndexError outside the corpus and ValueError where a file turns out to be damaged.

    Attributes:
        prefix: names the corpus.
        dtype: type of the stored tokens.
        num_tokens, num_documents: counts; tokens are those of all documents.
    """

    prefix: str
    dtype: np.dtype[Any]
    num_tokens: int
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
        bin_file, idx_file = bin_path(self.prefix), idx_path(self.prefix)
        _require_file(idx_file, bin_file)
        _require_file(bin_file, idx_file)
        self.index = DocumentIndex(idx_file)
        self.dtype = self.index.dtype
        self.tokens = TokenFile(bin_file, self.dtype)
        if self.tokens.num_bytes != self.index.num_bytes:
            raise ValueError(
                f"{idx_file} does not belong to {bin_file.name}: the index describes {self.index.num_bytes} "
                f"bytes of tokens, the file holds {self.tokens.num_bytes}; make the pair again with "
                "tools/preprocess_data.py."
            )
        self.num_tokens, self.num_documents = self.index.num_tokens, self.index.num_documents

    @property
    def info(self) -> dict[str, Any]:
        """What the maker wrote of the corpus: nothing, there is no list to hold it."""
        return {}

    @property
    def listed(self) -> None:
        """The entry of the pair in a list: there is none."""

    def pairs(self) -> Iterator[IndexedDataset]:
        """The one pair of this corpus."""
        yield self

    def document_start(self, document: int) -> int:
        return self.index.document_start(document)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        self.check_range(start, stop)
        return self.index.document_starts(start, stop)

    def read_into(self, start: int, out: Int64Array) -> None:
        if not 0 <= start <= self.num_tokens - len(out):
            self.check_range(start, start + len(out))
        self.tokens.read_into(start, out)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)  # other processes open the files anew


def _require_file(path: Path, partner: Path) -> None:
    if not path.is_file():
        if partner.is_file():
            hint = f"its partner {partner.name} is there, so the writing did not finish: make the pair again"
        elif path.with_suffix("").is_dir():
            hint = (
                f"{path.with_suffix('')} is a folder without a list {path.with_suffix('.shards').name} "
                "beside it: if preprocessing wrote it, run the same command again, it was not finished"
            )
        else:
            hint = "data.prefix is the path without .bin/.idx; make the pair with tools/preprocess_data.py"
        raise ValueError(f"{path} is missing; {hint}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); make the pair again with tools/preprocess_data.py.")
