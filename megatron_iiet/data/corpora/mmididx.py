"""Megatron's ``.bin``/``.idx`` format (MMIDIDX version 1): names, header, and checked access to both files.

``PREFIX.bin`` holds raw little-endian token ids; ``PREFIX.idx`` says where documents start::

    b"MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 sequences | u64 documents + 1
    i32[sequences] tokens per sequence | i64[sequences] byte offsets | i64[documents + 1] first sequence
    optional i8[sequences] modes (ignored)

A document is zero or more consecutive sequences. Opening costs the same for 1 MB and 1 TB: sizes and the
ends of every array are checked, nothing is scanned; :meth:`DocumentIndex.defects` scans.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.stores import READ_BYTES, Stamp, open_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: not tokens
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
DIGEST_BYTES = 16
BLOCK_ENTRIES = 1 << 18  # entries of an index handled at once when the whole of it is read
BLOCK_BYTES = READ_BYTES  # of a token file, handled at once
_UINT16_VOCAB_LIMIT = 65500  # Megatron's own threshold

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One pair as a shard list names it."""

    name: str  # prefix of the pair, relative to the folder of the list (or absolute)
    tokens: int
    documents: int
    bin_digest: bytes  # blake2b (16 bytes) of the whole file
    idx_digest: bytes


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """File of the token ids of the pair ``prefix``."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """File of the document index of the pair ``prefix``."""
    return Path(f"{os.fspath(prefix)}.idx")


def shards_path(prefix: str | os.PathLike[str]) -> Path:
    """File of the shard list of the corpus ``prefix``."""
    return Path(f"{os.fspath(prefix)}.shards")


def check_prefix(prefix: str | os.PathLike[str]) -> None:
    """Refuse an output prefix that is a folder's name (ValueError)."""
    if not os.path.basename(prefix):
        raise ValueError(f"The output prefix {prefix} ends in a slash; add a name for the files.")


def file_digest(path: str | os.PathLike[str]) -> bytes:
    """Digest of a whole file, as shard lists hold it."""
    file, digest = open_file(path), new_digest()
    for start in range(0, file.size, READ_BYTES):
        digest.update(file.read(start, start + READ_BYTES))
    return digest.digest()


def new_digest(data: bytes | memoryview = b"") -> hashlib.blake2b:
    """The digest of shard lists (16 bytes), of ``data`` so far."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES)


class DigestedFile:
    """A file written from its beginning to its end, with the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.num_bytes = 0
        self._hash = new_digest()

    @property
    def digest(self) -> bytes:
        """Digest of everything written so far."""
        return self._hash.digest()

    def write(self, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Append bytes, or an array's bytes."""
        raw = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data
        self.file.write(raw)
        self._hash.update(raw)
        self.num_bytes += len(raw)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of stored ids: uint16 for vocabularies under 65500, else int32 (Megatron's rule)."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB_LIMIT else "<i4")


class TokenFile:
    """A ``.bin`` file, read at any position by any number of threads; ``seen`` as :func:`.open_file` has it.

    Raises:
        ValueError: the file was cut short, or is another one than it was.
        OSError: it is missing, or cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], dtype: np.dtype[Any], seen: dict[str, Stamp] | None = None
    ) -> None:
        self._file = open_file(path, seen)
        self.path, self.num_bytes = self._file.name, self._file.size
        self.dtype = dtype

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` [n] (any integer type) with tokens [start, start + n)."""
        step = BLOCK_BYTES // self.dtype.itemsize
        for at in range(0, len(out), step):
            part = out[at : at + step]
            part[:] = np.frombuffer(self.read_bytes(start + at, start + at + len(part)), self.dtype)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Tokens [start, stop) as they are stored."""
        at, end = start * self.dtype.itemsize, stop * self.dtype.itemsize
        data = self._file.read(at, end)
        if len(data) < end - at:
            raise ValueError(
                f"{self.path} ends at byte {at + len(data)}, inside the tokens [{start}, {stop}) to be "
                f"read; it had {self.num_bytes} bytes when it was opened, so it was cut short since: "
                "restore it or make the pair again."
            )
        return data

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The whole file in order: (position of the first token, stored tokens [n]) of each block."""
        step, end = BLOCK_BYTES // self.dtype.itemsize, self.num_bytes // self.dtype.itemsize
        for start in range(0, end, step):
            yield start, np.frombuffer(self.read_bytes(start, min(start + step, end)), self.dtype)


class DocumentIndex:
    """An ``.idx`` file, memory-mapped (that of a url is fetched whole, once): where the documents of a pair
    start, in tokens.

    The three arrays are memoryviews: the header of 34 bytes leaves them unaligned, where numpy's searches
    would copy them whole.

    Attributes:
        dtype: type of the stored tokens.
        num_sequences, num_documents, num_tokens, num_bytes: counts; bytes are those of the ``.bin``.
        lengths: i32 [num_sequences], tokens of each sequence.
        offsets: i64 [num_sequences], byte of the ``.bin`` where each starts.
        first_sequences: i64 [num_documents + 1], first sequence of each document, and num_sequences.

    Raises:
        ValueError: the file is empty, of another format or version, cut short, or damaged at the ends of an
            array; damage elsewhere raises when a read meets it.
    """

    def __init__(self, path: str | os.PathLike[str], seen: dict[str, Stamp] | None = None) -> None:
        file = open_file(path, seen)
        self.path, size = file.name, file.size
        if size == 0:
            raise ValueError(f"{path} is empty (0 bytes); make the pair again.")
        self._map = file.map()
        head = self._map[: HEADER.size]
        self.dtype, self.num_sequences, self.num_documents = _read_header(path, head, size)
        self._size = size
        view, at = memoryview(self._map), HEADER.size

        def section(count: int, form: Literal["i", "q"]) -> memoryview[int]:
            nonlocal at
            begin, at = at, at + count * struct.calcsize(form)
            return view[begin:at].cast(form)

        self.lengths = section(self.num_sequences, "i")
        self.offsets = section(self.num_sequences, "q")
        self.first_sequences = section(self.num_documents + 1, "q")
        self._check_ends()

    def _check_ends(self) -> None:
        ends = (self.offsets[0], self.first_sequences[0], self.first_sequences[-1])
        if ends != (0, 0, self.num_sequences):
            raise ValueError(
                f"{self.path} is damaged: first byte offset, first and last document entries are {ends} "
                f"instead of (0, 0, {self.num_sequences}); make the pair again."
            )
        self.num_bytes = self.offsets[-1] + self.lengths[-1] * self.dtype.itemsize
        self.num_tokens, rest = divmod(self.num_bytes, self.dtype.itemsize)
        if rest or self.num_tokens <= 0 or self.lengths[-1] < 0:
            raise ValueError(
                f"{self.path} is damaged: its last sequence starts at byte {self.offsets[-1]} and has "
                f"{self.lengths[-1]} tokens of {self.dtype}; make the pair again."
            )

    def document_start(self, document: int) -> int:
        """Position of the first token of ``document``; ``num_documents`` gives the end of the stream.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.path}")
        self._require_whole()
        sequence = self.first_sequences[document]
        if sequence == self.num_sequences:
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences:
            raise self._damaged(f"document {document} starts at sequence {sequence}")
        start, rest = divmod(self.offsets[sequence], self.dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            raise self._damaged(f"sequence {sequence} starts at byte {self.offsets[sequence]}")
        return start

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """Positions p, start <= p < stop, where a document starts: int64, ascending, each once.

        Two documents start at one position where the first is empty. Time: logarithmic in the number of
        documents plus linear in the number found.
        """
        self._require_whole()
        itemsize = self.dtype.itemsize
        first = bisect_left(self.offsets, start * itemsize)
        last = bisect_left(self.offsets, stop * itemsize, first)
        if first == last:
            return np.empty(0, dtype=np.int64)
        sequences = int64_block(self.first_sequences, self._document_at(first), self._document_at(last))
        if sequences.size == 0:
            return sequences
        try:
            starts = int64_block(self.offsets, first, last)[sequences - first] // itemsize
        except IndexError:
            raise self._damaged(
                f"documents of the tokens [{start}, {stop}) start at sequences {sequences}"
            ) from None
        lengths = starts[1:] - starts[:-1]
        shortest = lengths.min(initial=1)
        if starts[0] < start or starts[-1] >= stop or shortest < 0:
            raise self._damaged(f"documents start at {starts} in the tokens [{start}, {stop})")
        return starts if shortest else starts[np.append(lengths > 0, True)]

    def _document_at(self, sequence: int) -> int:
        """First document that starts at ``sequence`` or behind it."""
        table, guess = self.first_sequences, min(sequence, self.num_documents)
        # We write one sequence a document; Megatron need not.
        if table[guess] >= sequence and (guess == 0 or table[guess - 1] < sequence):
            return guess
        return bisect_left(table, sequence)

    def document_lengths(self) -> Iterator[Int64Array]:
        """Tokens of every document in order, in blocks int64 [n]."""
        for at in range(0, self.num_documents, BLOCK_ENTRIES):
            stop = min(at + BLOCK_ENTRIES, self.num_documents)
            sequences = int64_block(self.first_sequences, at, stop + 1)
            low, high = int(sequences[0]), int(sequences[-1])
            if low < 0 or high > self.num_sequences or np.any(np.diff(sequences) < 0):
                raise self._damaged(f"documents {at} to {stop} do not start one behind the other")
            starts = int64_block(self.offsets, low, high + 1)
            if high == self.num_sequences:
                starts = np.append(starts, self.num_bytes)
            lengths = np.diff(starts[sequences - low]) // self.dtype.itemsize
            if lengths.min() < 0:
                raise self._damaged(f"one of the documents {at} to {stop} has {lengths.min()} tokens")
            yield lengths

    def length_blocks(self) -> Iterator[Int32Array]:
        """:attr:`lengths` in blocks int32 [n]."""
        for at in range(0, self.num_sequences, BLOCK_ENTRIES):
            yield np.frombuffer(self.lengths[at : at + BLOCK_ENTRIES], dtype="<i4")

    def defects(self) -> Iterator[str]:
        """Read the whole index; a sentence for each block of entries that contradict each other."""
        at = 0
        for lengths in self.length_blocks():
            stop = at + len(lengths)
            offsets = int64_block(self.offsets, at, stop + 1)
            if stop == self.num_sequences:
                offsets = np.append(offsets, self.num_bytes)
            wrong = (lengths < 0) | (np.diff(offsets) != lengths.astype(np.int64) * self.dtype.itemsize)
            yield from self._defect(wrong, at, "sequence {} does not end where the next one starts")
            at = stop
        for at in range(0, self.num_documents, BLOCK_ENTRIES):
            entries = int64_block(self.first_sequences, at, at + BLOCK_ENTRIES + 1)
            wrong = (np.diff(entries) < 0) | (entries[:-1] < 0) | (entries[1:] > self.num_sequences)
            yield from self._defect(wrong, at, "document {} does not end where the next one starts")

    def _defect(self, wrong: npt.NDArray[np.bool_], at: int, sentence: str) -> Iterator[str]:
        found = np.flatnonzero(wrong)
        if found.size:
            more = f" (and {found.size - 1} more)" if found.size > 1 else ""
            yield f"{self.path}: {sentence.format(at + found[0])}{more}."

    def digest(self) -> bytes:
        """Of the whole file, as shard lists hold it."""
        return new_digest(memoryview(self._map)).digest()

    def _require_whole(self) -> None:
        """Pages behind the end of a file that shrank would end the process with SIGBUS."""
        if self._map.size() < self._size:
            raise ValueError(
                f"{self.path} has {self._map.size()} bytes but had {self._size} when it was opened: it was "
                "cut short since; restore it or make the pair again."
            )

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is damaged: {what} (it has {self.num_documents} documents, {self.num_sequences} "
            f"sequences, {self.num_tokens} tokens); restore it or make the pair again."
        )


def int64_block(table: memoryview[int], start: int, stop: int) -> Int64Array:
    """Entries [start, stop) of an i64 table, copied: views into an index are unaligned."""
    return np.frombuffer(table[start:stop], dtype="<i8").copy()


def _read_header(path: str | os.PathLike[str], head: bytes, size: int) -> tuple[np.dtype[Any], int, int]:
    """dtype, sequences, documents of an ``.idx``, its size checked."""
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{path} is not a Megatron index: it starts with {head[: len(MAGIC)]!r} instead of {MAGIC!r}; "
            "check data.prefix or make the pair again."
        )
    if len(head) < HEADER.size:
        raise ValueError(f"{path} is cut short: {size} bytes, not even a header; make the pair again.")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, only {VERSION} is known; make the pair again."
        )
    if code not in DTYPES:
        raise ValueError(f"{path} has dtype code {code}, which is no integer type; make the pair again.")
    if num_sequences == 0 or num_bounds < 2:
        raise ValueError(f"{path} describes no documents; make the pair again from a file with text.")
    wanted = HEADER.size + num_sequences * 12 + num_bounds * 8
    if size not in (wanted, wanted + num_sequences):  # the second form carries modes
        raise ValueError(
            f"{path} is cut short or damaged: {num_sequences} sequences and {num_bounds - 1} documents "
            f"need {wanted} bytes, the file has {size}; make the pair again."
        )
    return np.dtype(DTYPES[code]), num_sequences, num_bounds - 1
