"""The tasks of workers: a chunk of lines, and a unit, which is all chunks of its inputs in order.

Which documents are kept, and for which split, is decided by keyed hashes of their text alone. A document's
fate depends neither on its place nor on the number of jobs, and copies share it. The sample and the held-out
splits use different keys, so they are independent; the split does not depend on the seed of the sample, so a
new sample never moves a document from a held-out split into training.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from io import BytesIO
from itertools import chain
from math import inf
from tempfile import TemporaryFile
from typing import IO, Any, TypeGuard

import numpy as np

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter, TokenArray
from megatron_iiet.data.corpora.mmididx import DIGEST_BYTES, Shard, bin_path, idx_path, token_dtype
from megatron_iiet.data.preprocess.dedup import DigestFiles, Duplicates
from megatron_iiet.data.preprocess.language import LANGUAGE_SCORE, is_in
from megatron_iiet.data.preprocess.layout import Layout, Output
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.records import Counts, OutputRecord, UnitRecord
from megatron_iiet.data.reading.long_text import LongText, Text, parts_of, strings_of
from megatron_iiet.data.reading.sources import InputFile, refuse_changed
from megatron_iiet.data.reading.text import LONG_LINE_BYTES, Chunk, Row, parse_rows, read_chunks
from megatron_iiet.data.stores import READ_BYTES
from megatron_iiet.data.tokenizers.base import MAX_PART_CHARACTERS, Tokenizer, UncuttableError

_SPLIT_KEY = b"held-out split"
_MAX_OUTPUTS = 256  # each holds files open
_UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP}

Report = Callable[[int], None]


def text_digest(text: Text) -> bytes:
    """128-bit BLAKE2b of the text's UTF-8 bytes; of a list of strings, of their digests in a row."""
    state = blake2b(digest_size=DIGEST_BYTES)
    if isinstance(text, tuple):
        state.update(b"".join(map(text_digest, text)))
        return state.digest()
    for part in parts_of(text):
        state.update(part.encode())
    return state.digest()


class BadInputError(ValueError):
    """An input cannot be read to its end as asked, for the reason given."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.bad_input = path


@dataclass(frozen=True)
class Filters:
    """The choices over documents: by their lengths and languages, and random ones."""

    rate: float | None = None  # fraction of documents in the sample; None keeps all
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0
    min_characters: int = 0
    max_characters: float = inf
    languages: Sequence[str] = ()  # none: all
    language_score: float = LANGUAGE_SCORE

    @property
    def splits(self) -> bool:
        """Whether outputs are divided into train, validation and test."""
        return self.validation > 0 or self.test > 0

    @property
    def need_digest(self) -> bool:
        """Whether any choice is to be made."""
        return self.splits or (self.rate is not None and self.rate < 1)

    def fits(self, text: Text) -> bool:
        """Whether a document has as many characters as are wanted."""
        lengths = (text.characters if isinstance(text, LongText) else len(text) for text in strings_of(text))
        return self.min_characters <= sum(lengths) <= self.max_characters

    def understood(self, text: Text) -> bool:
        """Whether a document is in a language that is wanted."""
        return not self.languages or is_in(text, self.languages, self.language_score)

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


def rest(recipe: Recipe, report: Report) -> None:
    """Task: give back the memory that the tokenizer can do without."""
    recipe.encoder.rest()


@dataclass
class Packed:
    """Consecutive documents of one output."""

    tokens: IO[bytes]  # in the recipe's dtype; a file where a giant document is alone
    lengths: list[int] = field(default_factory=list)  # tokens of each document

    def add(self, recipe: Recipe, pieces: Iterable[TokenArray]) -> bool:
        """Append a document given in pieces, ids [tokens] each; False if it has no tokens."""
        start = self.tokens.tell()
        try:
            for ids in pieces:
                self.tokens.write(ids.astype(recipe.dtype, copy=False).data)
        except UncuttableError:
            self.tokens.seek(start)
            self.tokens.truncate()
            raise
        length = (self.tokens.tell() - start) // recipe.dtype.itemsize
        if not length:
            return False
        if recipe.options.append_eod:
            self.tokens.write(np.array([recipe.encoder.eod_id], dtype=recipe.dtype).data)
            length += 1
        self.lengths.append(length)
        return True

    def write(self, writer: IndexedDatasetWriter) -> None:
        """Hand all documents to a writer."""
        self.tokens.seek(0)
        blocks = iter(lambda: self.tokens.read(READ_BYTES), b"")
        writer.add_blocks((np.frombuffer(block, writer.dtype) for block in blocks), self.lengths)
        self.tokens.close()


@dataclass
class EncodedChunk:
    """A chunk's documents by output, and what became of the other rows."""

    outputs: dict[Output, Packed] = field(default_factory=dict)
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
            strings = [string for text in texts for string in strings_of(text)]
            encoded = iter(recipe.encoder.encode_batch([text for text in strings if _is_short(text)]))
            for (row, split), text in zip(rows, texts, strict=True):
                parts = [
                    [next(encoded)] if _is_short(string) else recipe.encoder.encode_pieces(parts_of(string))
                    for string in strings_of(text)
                ]
                pieces = chain.from_iterable(parts)
                output = Output(row.source, split, key)
                if output not in result.outputs:
                    result.outputs[output] = Packed(self._file(recipe))
                packed = result.outputs[output]
                try:
                    # Some normalisers leave nothing of a text of white space: an empty document as well.
                    if packed.add(recipe, pieces):
                        counts.text_bytes += _utf8_bytes(text)
                    else:
                        counts.empty += 1
                except UncuttableError as error:
                    message = f"{self.chunk.path}, {self.chunk.word} {row.line}: {error}"
                    if recipe.options.bad_rows == "error":
                        raise BadInputError(self.chunk.path, message) from None
                    counts.reject("too long to encode", message)
        if len(self.chunk.data) > LONG_LINE_BYTES:
            self.chunk.data = b""  # whoever holds the chunk need not hold the text
        result.outputs = {output: packed for output, packed in result.outputs.items() if packed.lengths}
        report(sum(sum(packed.lengths) for packed in result.outputs.values()))
        return result

    def _file(self, recipe: Recipe) -> IO[bytes]:
        """For the tokens; those of a giant document need not be held."""
        if len(self.chunk.data) <= LONG_LINE_BYTES:
            return BytesIO()
        return TemporaryFile(dir=recipe.layout.records)

    def _selected(self, recipe: Recipe, counts: Counts) -> Iterator[tuple[Row, str | None]]:
        """Rows that pass the filters, and the split of each."""
        filters = recipe.filters
        for row in proper_rows(recipe, self.chunk, counts):
            text = identity(row)
            digest = text_digest(text) if text and filters.need_digest else bytes(DIGEST_BYTES)
            if text and not filters.fits(text):
                counts.wrong_length += 1
            elif text and not filters.sampled(digest):
                counts.sampled_out += 1
            elif self.duplicates and self.duplicates[row.line - self.chunk.first_line]:
                counts.duplicates += 1
            elif text and not filters.understood(text):  # last, as it takes longest
                counts.other_language += 1
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
            digest = text_digest(text) if text and recipe.filters.fits(text) else None
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
    rows, rejects = parse_rows(chunk, recipe.options.reading)
    if rejects and recipe.options.bad_rows == "error":
        raise BadInputError(chunk.path, rejects[0].message)
    for reject in rejects:
        counts.reject(reject.reason, reject.message)
    return rows


def identity(row: Row) -> Text:
    """The text that decides a row's fate: that of the first key, of the next where it is empty."""
    return next((text for text in row.texts if text), "")


def _is_short(text: Text) -> TypeGuard[str]:
    return isinstance(text, str) and len(text) <= MAX_PART_CHARACTERS


def _utf8_bytes(text: Text) -> int:
    if isinstance(text, tuple):
        return sum(map(_utf8_bytes, text))
    if isinstance(text, LongText):
        return text.utf8_bytes
    return len(text) if text.isascii() else len(text.encode())


@dataclass(frozen=True)
class Task(ABC):
    """All of something that is recorded when it is finished."""

    unit: int
    inputs: Sequence[InputFile]

    def without(self, recipe: Recipe, path: str, reason: str) -> Task | None:
        """The same with an input left out; None where it must not be, or others cannot be read again."""
        return None

    @abstractmethod
    def __call__(self, recipe: Recipe, report: Report) -> UnitRecord | None:
        """Run the task in this process."""


@dataclass(frozen=True)
class UnitTask(Task):
    """Task: all of a unit. Its chunks may be done elsewhere, in parallel, as tasks of their own."""

    skipped: Mapping[str, str] = field(default_factory=dict)  # paths of inputs to leave out, and why

    def without(self, recipe: Recipe, path: str, reason: str) -> UnitTask | None:
        if any(file.is_stream and file.path != path for file in self.inputs):
            return None
        return replace(self, skipped={**self.skipped, path: reason})

    def _read(self, recipe: Recipe) -> Iterator[tuple[int, Chunk]]:
        """Number of the input, and chunk, of all inputs but those to leave out."""
        for number, file in enumerate(self.inputs):
            if file.path in self.skipped:
                continue
            try:
                for chunk in read_chunks(file, recipe.options.reading, recipe.options.chunk_bytes):
                    yield number, chunk
            except OSError as error:
                if (
                    "://" in file.path or error.errno not in _UNREADABLE
                ):  # what may pass is no fault of the input
                    raise
                raise BadInputError(file.path, str(error)) from error
            except ValueError as error:
                raise BadInputError(file.path, str(error)) from error
            refuse_changed(file)

    @abstractmethod
    def chunks(self, recipe: Recipe) -> Iterator[EncodeChunk | DigestChunk]:
        """A task for each chunk, in order."""

    @abstractmethod
    def write(self, recipe: Recipe, results: Iterable[Any]) -> UnitRecord | None:
        """Write down the results of all chunks, which come in order; the record of what was published."""

    def __call__(self, recipe: Recipe, report: Report) -> UnitRecord | None:
        return self.write(recipe, (task(recipe, report) for task in self.chunks(recipe)))


@dataclass(frozen=True)
class DigestUnit(UnitTask):
    """First pass of deduplication."""

    def chunks(self, recipe: Recipe) -> Iterator[DigestChunk]:
        for _, chunk in self._read(recipe):
            yield DigestChunk(chunk)

    def write(self, recipe: Recipe, results: Iterable[tuple[str, int, bytes]]) -> None:
        numbers = {file.path: number for number, file in enumerate(self.inputs)}
        pieces = ((numbers[path], first_line, digests) for path, first_line, digests in results)
        DigestFiles(recipe.layout.records).write(self.inputs, pieces, self.skipped)


@dataclass(frozen=True)
class EncodeUnit(UnitTask):
    """Text to shards."""

    first_input: int = 0  # inputs of the units before

    def without(self, recipe: Recipe, path: str, reason: str) -> UnitTask | None:
        """Also None for an input that the first pass of deduplication could read: documents elsewhere were
        dropped as copies of its own."""
        if recipe.options.deduplicate:
            number = self.first_input + [file.path for file in self.inputs].index(path)
            if Duplicates(recipe.layout.records).lines(number):
                return None
        return super().without(recipe, path, reason)

    def chunks(self, recipe: Recipe) -> Iterator[EncodeChunk]:
        if not recipe.options.deduplicate:
            yield from (EncodeChunk(chunk) for _, chunk in self._read(recipe))
            return
        duplicates = Duplicates(recipe.layout.records)
        for number, chunk in self._read(recipe):
            lines = chunk.data.count(b"\n") + 1
            if not duplicates.lines(self.first_input + number):
                raise BadInputError(
                    chunk.path,
                    f"{chunk.path} could not be read when duplicates were looked for, and has not changed "
                    "since; mend it, or touch it to have it read again.",
                )
            yield EncodeChunk(chunk, duplicates.marks(self.first_input + number, chunk.first_line, lines))

    def write(self, recipe: Recipe, results: Iterable[EncodedChunk]) -> UnitRecord:
        counts = Counts()
        writers: dict[Output, IndexedDatasetWriter] = {}
        with ExitStack() as stack:
            for result in results:
                counts.add(result.counts)
                for output, packed in result.outputs.items():
                    if output not in writers:
                        writers[output] = stack.enter_context(self._open(recipe, output, len(writers)))
                    packed.write(writers[output])
            shards = {
                output: writers[output].close() for output in sorted(writers, key=lambda each: each.name)
            }
        outputs = {
            output.name: output_record(writers[output].prefix, shard) for output, shard in shards.items()
        }
        marks = ""
        if recipe.options.deduplicate:
            marks = Duplicates(recipe.layout.records).digest(self.first_input, len(self.inputs))
        return UnitRecord(self.unit, list(self.inputs), outputs, counts, dict(self.skipped), marks)

    def _open(self, recipe: Recipe, output: Output, others: int) -> IndexedDatasetWriter:
        if others == _MAX_OUTPUTS:
            raise ValueError(
                f"{self.inputs[0].path} and what follows have more than {_MAX_OUTPUTS} outputs; does "
                f"{recipe.options.split_by!r} name sources?"
            )
        claims = Claims(recipe.layout)
        claims.take(output)
        return claims.open_shard(recipe.layout.units, output.name, self.unit, recipe.encoder.vocab_size)


def output_record(prefix: str, shard: Shard) -> OutputRecord:
    """What is recorded of a shard that was published."""
    tokens, index = bin_path(prefix).stat(), idx_path(prefix).stat()
    return OutputRecord(
        documents=shard.documents,
        tokens=shard.tokens,
        bin_bytes=tokens.st_size,
        idx_bytes=index.st_size,
        bin_digest=shard.bin_digest.hex(),
        idx_digest=shard.idx_digest.hex(),
        bin_changed=tokens.st_mtime_ns,
        idx_changed=index.st_mtime_ns,
    )
