"""One chunk of lines: rows, filters, tokens. The same code in every process and for every layout.

Which documents are kept, and for which split, is decided by keyed hashes of their text alone. A document's
fate depends neither on its place nor on the number of jobs, and copies share it. The sample and the held-out
splits use different keys, so they are independent; the split does not depend on the seed of the sample, so a
new sample never moves a document from a held-out split into training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_iiet.data.corpora.indexed_writer import TokenArray
from megatron_iiet.data.corpora.mmididx import token_dtype
from megatron_iiet.data.preprocess.layout import Layout, output_name
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.records import Counts
from megatron_iiet.data.reading.long_text import LongText
from megatron_iiet.data.reading.text import Chunk, Row, parse_rows, raise_first
from megatron_iiet.data.tokenizers.base import Tokenizer

DIGEST_BYTES = 16
_SPLIT_KEY = b"held-out split"

Text = str | LongText
Report = Callable[[int], None]


def text_digest(text: Text) -> bytes:
    """128-bit BLAKE2b of the text's UTF-8 bytes."""
    if isinstance(text, str):
        return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
    state = blake2b(digest_size=DIGEST_BYTES)
    for part in text.parts():
        state.update(part.encode())
    return state.digest()


@dataclass(frozen=True)
class Filters:
    """The random choices over documents."""

    rate: float | None = None  # fraction of documents in the sample; None keeps all
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    @property
    def splits(self) -> bool:
        """Whether outputs are divided into train, validation and test."""
        return self.validation > 0 or self.test > 0

    @property
    def need_digest(self) -> bool:
        """Whether any choice is to be made."""
        return self.splits or (self.rate is not None and self.rate < 1)

    def sampled(self, digest: bytes) -> bool:
        """Whether a document is in the sample."""
        if self.rate is None or self.rate >= 1:
            return True
        return _fraction(digest, b"sample %d" % self.seed) < self.rate

    def split(self, digest: bytes) -> str:
        """train, validation or test."""
        place = _fraction(digest, _SPLIT_KEY)
        if place < self.validation:
            return "validation"
        return "test" if place < self.validation + self.test else "train"


def _fraction(digest: bytes, key: bytes) -> float:
    """A uniform number in [0, 1) that digest and key determine."""
    return int.from_bytes(blake2b(digest, digest_size=6, key=key).digest(), "little") / 2**48


@dataclass(frozen=True)
class Recipe:
    """What every worker needs to know; the start-up argument of worker processes."""

    options: PreprocessOptions
    encoder: Tokenizer
    layout: Layout
    filters: Filters

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of stored tokens."""
        return token_dtype(self.encoder.vocab_size)


@dataclass
class Packed:
    """Consecutive documents of one output."""

    tokens: bytearray = field(default_factory=bytearray)  # in the recipe's dtype
    lengths: list[int] = field(default_factory=list)  # tokens of each document

    def add(self, recipe: Recipe, pieces: Iterable[TokenArray]) -> bool:
        """Append a document given in pieces, ids [tokens] each; False if it has no tokens.

        A giant one is held once, in the stored type.
        """
        start = len(self.tokens)
        for ids in pieces:
            self.tokens += ids.astype(recipe.dtype, copy=False).data
        length = (len(self.tokens) - start) // recipe.dtype.itemsize
        if not length:
            return False
        if recipe.options.append_eod:
            self.tokens += np.array([recipe.encoder.eod_id], dtype=recipe.dtype).data
            length += 1
        self.lengths.append(length)
        return True


@dataclass
class EncodedChunk:
    """A chunk's documents by output, and what became of the other rows."""

    outputs: dict[str, Packed] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class EncodeChunk:
    """Task: tokenize a chunk."""

    chunk: Chunk
    duplicates: bytes | None = None  # nonzero for lines that repeat an earlier document; None: not looked for

    def __call__(self, recipe: Recipe, report: Report) -> EncodedChunk:
        """Run the task.

        Raises:
            ValueError: a row is defective, and such rows are not to be skipped.
        """
        result = EncodedChunk()
        counts = result.counts
        rows = list(self._selected(recipe, counts))
        for column, key in enumerate(recipe.options.json_keys):
            texts = [row.texts[column] for row, _ in rows]
            encoded = iter(recipe.encoder.encode_batch([text for text in texts if isinstance(text, str)]))
            for (row, split), text in zip(rows, texts, strict=True):
                pieces = (
                    [next(encoded)] if isinstance(text, str) else recipe.encoder.encode_pieces(text.parts())
                )
                output = output_name(row.source, split, key)
                packed = result.outputs.get(output) or result.outputs.setdefault(output, Packed())
                # Some normalisers leave nothing of a text of white space: that is an empty document as well.
                if packed.add(recipe, pieces):
                    counts.text_bytes += _utf8_bytes(text)
                else:
                    counts.empty += 1
        result.outputs = {output: packed for output, packed in result.outputs.items() if packed.lengths}
        report(sum(sum(packed.lengths) for packed in result.outputs.values()))
        return result

    def _selected(self, recipe: Recipe, counts: Counts) -> Iterator[tuple[Row, str | None]]:
        """Rows that pass the filters, and the split of each."""
        filters = recipe.filters
        for row in proper_rows(recipe, self.chunk, counts):
            text = identity(row)
            digest = text_digest(text) if text and filters.need_digest else bytes(DIGEST_BYTES)
            if text and not filters.sampled(digest):
                counts.sampled_out += 1
            elif self.duplicates and self.duplicates[row.line - self.chunk.first_line]:
                counts.duplicates += 1
            else:
                yield row, filters.split(digest) if filters.splits else None


@dataclass(frozen=True)
class DigestChunk:
    """Task: digests of the documents of a chunk."""

    chunk: Chunk

    def __call__(self, recipe: Recipe, report: Report) -> tuple[str, int, bytes]:
        """Path, first line, and 16 bytes a line: zeros where no document is, or none of the sample."""
        lines = self.chunk.data.count(b"\n") + 1
        digests = bytearray(lines * DIGEST_BYTES)
        for row in proper_rows(recipe, self.chunk, Counts()):
            text = identity(row)
            digest = text_digest(text) if text else None
            if digest and recipe.filters.sampled(digest):
                start = (row.line - self.chunk.first_line) * DIGEST_BYTES
                digests[start : start + DIGEST_BYTES] = digest
        report(lines)
        return self.chunk.path, self.chunk.first_line, bytes(digests)


def proper_rows(recipe: Recipe, chunk: Chunk, counts: Counts) -> list[Row]:
    """Rows of a chunk; defective ones are counted, or an error.

    Raises:
        ValueError: a row is defective, and such rows are not to be skipped.
    """
    rows, rejects = parse_rows(chunk, recipe.options.json_keys, recipe.options.split_by)
    if recipe.options.bad_rows == "error":
        raise_first(rejects)
    for reject in rejects:
        counts.reject(reject.reason, reject.message)
    return rows


def identity(row: Row) -> Text:
    """The text that decides a row's fate: that of the first key, of the next where it is empty."""
    return next((text for text in row.texts if text), "")


def _utf8_bytes(text: Text) -> int:
    if isinstance(text, LongText):
        return text.utf8_bytes
    return len(text) if text.isascii() else len(text.encode())
