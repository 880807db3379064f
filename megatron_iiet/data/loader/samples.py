"""Samples: T + 1 tokens cut from a range of documents, in one of three ways.

``ignore``
    The documents of a split form one stream; window i is tokens [i T, i T + T + 1) of it, so neighbours share
    one token and every token but the first is predicted once.
``reset``
    The same windows with the position of every token in its document: each document that starts inside a
    window is a sequence of its own.
``pack``
    Documents are cut into pieces of at most T + 1 tokens, and the pieces are packed into samples: no sample
    begins in the middle of a document unless that is longer than T + 1 tokens or had to fill a gap.

Nothing is built at start-up or stored: what a sample holds follows from its number, and for ``pack`` from the
documents of its block.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.data.corpora.streams import TokenStream, open_corpus
from megatron_iiet.data.loader.packing import Packing, pack_documents


class UnknownTokenError(ValueError):
    """A corpus holds an id that the model has no embedding row for."""


@dataclass(eq=False)
class Samples(ABC):
    """Samples from tokens [start, stop) of a stream, read by number from any thread."""

    stream: TokenStream  # the corpus
    start: int  # first token of the split, the start of a document
    stop: int  # end of the split, the end of a document
    sequence_length: int  # T
    vocab_size: int | None = None  # ids that the model knows: 0 to vocab_size - 1; None: its own, for sure

    has_positions: ClassVar[bool]  # whether tokens come with positions

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, whether or not they fill samples."""
        return self.stop - self.start

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fill(self, index: int, tokens: Int64Array, positions: Int64Array | None) -> None:
        """Write sample ``index`` into ``tokens``, int64 [T + 1], and iff :attr:`has_positions` into
        ``positions``.

        Positions count from 0 at the start of the sample and of each document inside. Where one is 0 there is
        nothing to predict. Padding has token 0 and positions 0.

        Raises:
            UnknownTokenError: a token is outside the model's vocabulary.
        """

    @abstractmethod
    def counted(self, indices: Int64Array) -> int:
        """How many positions of all these samples together are above 0."""

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

    def _read(self, start: int, out: Int64Array) -> None:
        """Fill ``out``, int64 [n], with tokens [start, start + n) of the stream, which the model must know:
        an id beyond the vocabulary is a zero vector under tensor parallelism and in the rows that pad the
        vocabulary, and would train without a word."""
        self.stream.read_into(start, out)
        if self.vocab_size is None or not len(out) or out.view(np.uint64).max() < self.vocab_size:
            return  # as unsigned numbers negative ones are the largest
        at = int(np.argmax((out < 0) | (out >= self.vocab_size)))
        document = _document_at(self.stream, start + at)
        raise UnknownTokenError(
            f"the corpus {self.stream.prefix} holds the id {out[at]} (document {document}, its token "
            f"{start + at - self.stream.document_start(document)}), but model.vocab_size is "
            f"{self.vocab_size}; give the corpus that was made with this model's tokenizer, or raise "
            "model.vocab_size"
        )


class TokenWindows(Samples):
    """Windows of the stream, whatever documents they cross."""

    has_positions = False

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    def fill(self, index: int, tokens: Int64Array, positions: Int64Array | None = None) -> None:
        self._read(self._first(index), tokens)

    def counted(self, indices: Int64Array) -> int:
        return len(indices) * self.sequence_length

    def _first(self, index: int) -> int:
        """Where window ``index`` starts in the stream."""
        self._check(index)
        return self.start + index * self.sequence_length


class DocumentWindows(TokenWindows):
    """Windows of the stream in which every document is a sequence of its own."""

    has_positions = True

    def fill(self, index: int, tokens: Int64Array, positions: Int64Array | None = None) -> None:
        assert positions is not None
        first = self._first(index)
        self._read(first, tokens)
        bounds = [0, *(self._starts(first) - first).tolist(), len(positions)]
        for start, stop in pairwise(bounds):
            positions[start:stop] = _counting(len(positions))[: stop - start]

    def counted(self, indices: Int64Array) -> int:
        starts = sum(len(self._starts(self._first(index))) for index in indices.tolist())
        return len(indices) * self.sequence_length - starts

    def _starts(self, first: int) -> Int64Array:
        """Documents that start inside the window; its first token starts one anyway."""
        return self.stream.document_starts(first + 1, first + self.sequence_length + 1)


@dataclass(eq=False)
class PackedSamples(Samples):
    """Pieces of documents, packed into samples without crossing them.

    The tokens of 64 samples are a block, whose pieces are packed into 65 samples; 1.5 % of them is padding.
    Where lengths are mixed, as in crawled text, that is room enough to cut hardly a document but those longer
    than a sample and one at each border of blocks. Where they do not go together (all of two thirds of a
    sample, say), documents are cut to fill the samples. The first token of a piece has nothing to be
    predicted from; a last block of a single token, which has nothing but that, is left out.
    """

    has_positions = True
    block = 64
    """Samples whose tokens are packed together. More take longer to pack, fewer need more padding."""
    samples_per_block = block + 1
    _KEPT = 4096  # packed blocks, a few kilobytes each: a global batch is counted before its samples are read

    def __post_init__(self) -> None:
        self._block_tokens = self.block * (self.sequence_length + 1)
        self._packing = lru_cache(self._KEPT)(self._pack)

    def __len__(self) -> int:
        blocks, rest = divmod(self.num_tokens, self._block_tokens)
        return blocks * self.samples_per_block + self._samples_of(rest)

    def fill(self, index: int, tokens: Int64Array, positions: Int64Array | None = None) -> None:
        assert positions is not None
        at = 0
        numbers = _counting(len(positions))
        for start, length in zip(*self._pieces(index), strict=True):
            self._read(start, tokens[at : at + length])
            positions[at : at + length] = numbers[:length]
            at += length
        tokens[at:] = 0
        positions[at:] = 0

    def counted(self, indices: Int64Array) -> int:
        return sum(sum(lengths) - len(lengths) for _, lengths in map(self._pieces, indices.tolist()))

    def _pieces(self, index: int) -> tuple[list[int], list[int]]:
        """First token and length of each piece of a sample."""
        self._check(index)
        number, sample = divmod(index, self.samples_per_block)
        packing = self._packing(number)
        inside = slice(*packing.bounds[sample : sample + 2].tolist())
        return packing.starts[inside].tolist(), packing.lengths[inside].tolist()

    def _pack(self, number: int) -> Packing:
        first = self.start + number * self._block_tokens
        stop = min(self.stop, first + self._block_tokens)
        documents = self.stream.document_starts(first, stop)
        bins = self._samples_of(stop - first)
        return pack_documents(documents, first, stop, bins, self.sequence_length + 1)

    def _samples_of(self, tokens: int) -> int:
        """Samples of a block of so many tokens, the last of a split: its share; one token predicts
        nothing."""
        return -(-tokens * self.samples_per_block // self._block_tokens) if tokens > 1 else 0


def _document_at(stream: TokenStream, position: int) -> int:
    """The document that holds the token at ``position``: the last one that starts there or before."""
    return bisect_right(range(stream.num_documents), position, key=stream.document_start) - 1


@lru_cache(8)
def _counting(length: int) -> Int64Array:
    return np.arange(length)


KINDS: dict[str, type[Samples]] = {"ignore": TokenWindows, "reset": DocumentWindows, "pack": PackedSamples}
"""By ``data.documents``."""


class Splits(NamedTuple):
    """The three parts of a corpus, in document order."""

    train: Samples
    validation: Samples
    test: Samples


def build_splits(
    prefix: str | os.PathLike[str],
    sequence_length: int,
    split: Sequence[float],
    documents: str = "ignore",
    *,
    vocab_size: int,
    may_lack: Collection[str] = (),
) -> Splits:
    """Cut the corpus ``prefix`` into train, validation and test by shares of its documents.

    Args:
        prefix: of a pair or a list of shards.
        sequence_length: T.
        split: shares of the documents.
        documents: how samples treat their borders, a key of :data:`KINDS`.
        vocab_size: ids that the model knows; reading another one raises :class:`UnknownTokenError`.
        may_lack: parts that may be too small for a sample though they have a share.

    Raises:
        ValueError: the corpus is unreadable, ``split`` is not three shares summing to 1, or a part with a
            share has too few tokens for one sample.
    """
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length is {sequence_length}; it must be at least 1.")
    shares = np.asarray(split, dtype=np.float64)
    if shares.shape != (3,) or not np.all(shares >= 0) or abs(float(shares.sum()) - 1) > 1e-6:
        raise ValueError(
            f"data.split is {list(split)}; give three shares (train, validation, test), none negative, sum 1."
        )
    stream = open_corpus(prefix)
    bounds = np.rint(np.append(0.0, np.cumsum(shares)) * stream.num_documents).astype(np.int64)
    starts = [stream.document_start(int(document)) for document in bounds]
    parts = []
    for i, name in enumerate(Splits._fields):
        part = KINDS[documents](stream, starts[i], starts[i + 1], sequence_length, vocab_size)
        if shares[i] > 0 and len(part) == 0 and name not in may_lack:
            raise ValueError(
                f"The {name} split of {stream.prefix} has {bounds[i + 1] - bounds[i]} documents with "
                f"{part.num_tokens} tokens, too few for a window of {sequence_length + 1}; give it a larger "
                "share in data.split (or 0), shorten data.sequence_length, or use more text."
            )
        parts.append(part)
    return Splits(*parts)
