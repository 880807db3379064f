"""Token shards in Megatron's ``.bin``/``.idx`` format (MMIDIDX version 1), memory-mapped.

``PREFIX.bin`` holds raw little-endian token ids; ``PREFIX.idx`` says where documents start::

    b"MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 sequences | u64 documents + 1
    i32[sequences] tokens per sequence | i64[sequences] byte offsets | i64[documents + 1] first sequence
    optional i8[sequences] modes (ignored)

A document is one or more consecutive sequences. Opening costs the same for 1 MB and 1 TB: sizes are
checked, nothing is scanned.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: not tokens
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_UINT16_VOCAB_LIMIT = 65500  # Megatron's own threshold

TokenArray = npt.NDArray[np.integer[Any]]
Int64Array = npt.NDArray[np.int64]


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """File of the token ids of the shard ``prefix``."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """File of the document index of the shard ``prefix``."""
    return Path(f"{os.fspath(prefix)}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of stored ids: uint16 for vocabularies under 65500, else int32 (Megatron's rule)."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB_LIMIT else "<i4")


class IndexedDataset:
    """One memory-mapped shard, seen as a stream of tokens cut into documents.

    Raises:
        ValueError: a file is missing, empty, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._open()

    def _open(self) -> None:
        bin_file, idx_file = bin_path(self.prefix), idx_path(self.prefix)
        _require_file(idx_file, bin_file)
        _require_file(bin_file, idx_file)
        self.dtype, num_sequences, num_documents = _read_header(idx_file)
        index = np.memmap(idx_file, dtype=np.uint8, mode="r")
        cursor = _HEADER.size

        def section(count: int, dtype: str) -> np.ndarray:
            nonlocal cursor
            start, cursor = cursor, cursor + count * np.dtype(dtype).itemsize
            return index[start:cursor].view(np.ndarray).view(dtype)

        self._lengths = section(num_sequences, "<i4")
        self._offsets = section(num_sequences, "<i8")
        self._first_sequence = section(num_documents + 1, "<i8")
        self._check(bin_file, idx_file)
        self._tokens = np.memmap(bin_file, dtype=self.dtype, mode="r")

    def _check(self, bin_file: Path, idx_file: Path) -> None:
        """First and last entries against each other and the ``.bin``: constant work, catches stale pairs."""
        promised = int(self._offsets[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        found = bin_file.stat().st_size
        if promised != found:
            raise ValueError(
                f"{idx_file} does not belong to {bin_file.name}: the index describes {promised} bytes of "
                f"tokens, the file holds {found}; make the pair again with tools/preprocess_data.py."
            )
        ends = (int(self._offsets[0]), int(self._first_sequence[0]), int(self._first_sequence[-1]))
        if ends != (0, 0, len(self._lengths)):
            raise ValueError(
                f"{idx_file} is damaged: first byte offset, first and last document entries are {ends} "
                f"instead of (0, 0, {len(self._lengths)}); make the pair again."
            )

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._first_sequence) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all documents."""
        return len(self._tokens)

    def document_start(self, document: int) -> int:
        """Position in the stream of the first token of ``document``; ``num_documents`` gives the end."""
        sequence = int(self._first_sequence[document])
        if sequence == len(self._offsets):
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    @property
    def document_bounds(self) -> Int64Array:
        """Start of every document and the end of the last one, int64 [num_documents + 1]. Reads the index."""
        starts = np.append(self._offsets, self.num_tokens * self.dtype.itemsize) // self.dtype.itemsize
        return starts[self._first_sequence].astype(np.int64)

    def read(self, start: int, stop: int) -> Int64Array:
        """Tokens [start, stop) of the concatenated stream, int64 [stop - start].

        Raises:
            IndexError: the range leaves [0, num_tokens].
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"range [{start}, {stop}) leaves the {self.num_tokens} tokens of {self.prefix}")
        return self._tokens[start:stop].astype(np.int64)

    def document(self, index: int) -> Int64Array:
        """Tokens of one document, int64 [tokens]."""
        return self.read(self.document_start(index), self.document_start(index + 1))

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}  # loader processes map the files anew instead of receiving their bytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _require_file(path: Path, partner: Path) -> None:
    if not path.is_file():
        hint = (
            f"its partner {partner.name} is there, so the writing did not finish: make the pair again"
            if partner.is_file()
            else "data.prefix is the path without .bin/.idx; make the pair with tools/preprocess_data.py"
        )
        raise ValueError(f"{path} is missing; {hint}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); make the pair again with tools/preprocess_data.py.")


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, sequences, documents of an ``.idx``, its size checked."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{path} is not a Megatron index: it starts with {head[: len(MAGIC)]!r} instead of {MAGIC!r}; "
            "check data.prefix or make the pair again."
        )
    size = path.stat().st_size
    if len(head) < _HEADER.size:
        raise ValueError(f"{path} is cut short: {size} bytes, not even a header; make the pair again.")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != _VERSION:
        raise ValueError(
            f"{path} has format version {version}, only {_VERSION} is known; make the pair again."
        )
    if code not in _DTYPES:
        raise ValueError(f"{path} has dtype code {code}, which is no integer type; make the pair again.")
    if num_sequences == 0 or num_bounds < 2:
        raise ValueError(f"{path} describes no documents; make the pair again from a file with text.")
    wanted = _HEADER.size + num_sequences * 12 + num_bounds * 8
    if size not in (wanted, wanted + num_sequences):  # the second form carries modes
        raise ValueError(
            f"{path} is cut short or damaged: {num_sequences} sequences and {num_bounds - 1} documents "
            f"need {wanted} bytes, the file has {size}; make the pair again."
        )
    return np.dtype(_DTYPES[code]), num_sequences, num_bounds - 1


class IndexedDatasetWriter:
    """Writes a shard; the pair appears under its name only when complete.

    Use it as a context manager: leaving normally publishes the pair, leaving by an exception removes every
    trace. Temporary names are ``PREFIX.bin.partial`` and ``PREFIX.idx.partial``; a killed run leaves those
    and the next one overwrites them.

    Raises:
        ValueError: the folder is missing, another process is writing the prefix, an id is outside
            [0, vocab_size), or no document was added.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self._partials = [Path(f"{path}.partial") for path in (bin_path(prefix), idx_path(prefix))]
        if not self._partials[0].parent.is_dir():
            raise ValueError(
                f"The folder {self._partials[0].parent} of the output prefix is missing; create it."
            )
        self._file: IO[bytes] = _open_locked(self._partials[0])

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, tokens: bytes | TokenArray) -> None:
        """Append one document: ids [tokens], as an array or packed in this writer's ``dtype``."""
        length = len(tokens) // self.dtype.itemsize if isinstance(tokens, bytes) else len(tokens)
        self.add_documents(tokens, np.array([length], dtype=np.int64))

    def add_documents(self, tokens: bytes | TokenArray, lengths: npt.ArrayLike) -> None:
        """Append consecutive documents: ids [sum(lengths)] and their lengths in tokens, int [documents]."""
        ids = np.frombuffer(tokens, dtype=self.dtype) if isinstance(tokens, bytes) else np.asarray(tokens)
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size and (lengths.min() < 1 or lengths.max() >= 2**31):
            raise ValueError(
                f"A document of {lengths.min()} to {lengths.max()} tokens does not fit {self.prefix}: "
                "the format holds 1 to 2147483647; skip empty documents, cut giant ones."
            )
        if lengths.sum() != ids.size:
            raise ValueError(f"{ids.size} tokens do not fill documents of {lengths.sum()} tokens in all.")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(
                f"Token ids {ids.min()} to {ids.max()} leave the vocabulary [0, {self.vocab_size}); "
                "tokenizer and vocab_size do not belong together."
            )
        self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self.num_tokens += ids.size

    def close(self) -> list[Path]:
        """Publish the pair and return its two paths."""
        if not self._lengths:
            raise ValueError(f"No documents for {self.prefix}: there is nothing to write.")
        bin_partial, idx_partial = self._partials
        _sync(self._file)
        with idx_partial.open("wb") as file:
            self._write_index(file)
            _sync(file)
        targets = [bin_path(self.prefix), idx_path(self.prefix)]
        # An index of an earlier run must never describe the new bytes, not even between two renames.
        targets[1].unlink(missing_ok=True)
        bin_partial.rename(targets[0])
        idx_partial.rename(targets[1])
        self._file.close()
        return targets

    def discard(self) -> None:
        """Remove everything written so far; published pairs stay."""
        self._file.close()
        for path in self._partials:
            path.unlink(missing_ok=True)

    def _write_index(self, file: IO[bytes]) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self.dtype.itemsize
        code = _CODES[self.dtype]
        file.write(_HEADER.pack(MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        try:
            if kind is None:
                self.close()
        finally:
            if not self._file.closed:
                self.discard()


def _open_locked(path: Path) -> IO[bytes]:
    """Open for writing, emptied, unless another process holds it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"{path} is being written by another process; choose another output prefix."
        ) from None
    except OSError:
        pass  # file systems without locks: the check is a courtesy
    file.truncate(0)
    return file


def _sync(file: IO[bytes]) -> None:
    file.flush()
    with contextlib.suppress(OSError):  # pipes and some network file systems cannot
        os.fsync(file.fileno())
