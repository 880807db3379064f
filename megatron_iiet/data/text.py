"""Documents from ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` files, one JSON object a line.

Nothing is guessed and nothing is dropped: the first line that is not a JSON object with the wanted text
raises a ValueError naming file and line. Blank lines are allowed at the end of a file only. Reading is in
two halves so that workers can share the second: :func:`read_chunks` (decompress, cut at line ends) and
:func:`parse_chunk` (JSON, checks).
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = (".jsonl", ".json", ".ndjson")
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file."""

    path: str
    first_line: int
    """Number of the first line, counted from 1."""
    data: bytes
    """UTF-8 lines joined by line breaks."""


def expand_inputs(patterns: Iterable[str]) -> list[str]:
    """Files behind paths and globs: in the order given, each glob's matches sorted.

    Raises:
        ValueError: a file is missing or of an unknown kind, a glob matches nothing, a file occurs twice.
    """
    paths: list[str] = []
    for pattern in patterns:
        is_glob = not os.path.exists(pattern) and not _GLOB_CHARACTERS.isdisjoint(pattern)
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches:
            raise ValueError(f"The input pattern {pattern} matches no file; check the path.")
        paths += matches
    for path in paths:
        if not os.path.isfile(path):
            found = (
                "is a folder; give its files, for example with a glob"
                if os.path.isdir(path)
                else "is missing"
            )
            raise ValueError(f"The input {path} {found}.")
        if not path.removesuffix(".gz").removesuffix(".zst").endswith(_SUFFIXES):
            raise ValueError(
                f"The input {path} is of an unknown kind; give .jsonl, .jsonl.gz or .jsonl.zst files."
            )
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"The input {twice[0]} is named twice; name every file once.")
    return paths


def iter_documents(paths: Iterable[str | os.PathLike[str]], key: str = "text") -> Iterator[str]:
    """Texts of all documents of all files, in order, empty ones included.

    Raises:
        ValueError: see the module's description.
    """
    for path in paths:
        for chunk in read_chunks(path):
            for (text,) in parse_chunk(chunk, [key]):
                yield text


def read_chunks(path: str | os.PathLike[str], chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """Whole lines of a file in chunks of about ``chunk_bytes``; a longer line makes a longer chunk.

    Blank lines wait until a line with content follows, so those that end a file are dropped.

    Raises:
        ValueError: the file is empty, its compression is damaged or cut short, or it starts with a BOM.
    """
    name = os.fspath(path)
    first_line = 1
    pending = bytearray()
    for block in _decompressed(name):
        searched = len(pending)
        pending += block
        if len(pending) < chunk_bytes:
            continue
        line_end = pending.rfind(b"\n", searched) + 1
        content = bytes(pending[:line_end]).rstrip()
        if content:
            yield _checked(Chunk(name, first_line, content))
            first_line += content.count(b"\n") + 1
            del pending[: pending.index(b"\n", len(content)) + 1]
    content = bytes(pending).rstrip()
    if content:
        yield _checked(Chunk(name, first_line, content))
    elif first_line == 1:
        raise ValueError(f"{name} holds no documents (no line with content); remove it from the inputs.")


def _checked(chunk: Chunk) -> Chunk:
    if chunk.first_line == 1 and chunk.data.startswith(_BOM):
        raise ValueError(
            f"{chunk.path}, line 1: starts with a byte-order mark; save it as UTF-8 without BOM."
        )
    return chunk


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts under ``keys`` of every line of a chunk.

    Raises:
        ValueError: a line is not UTF-8, blank, not a JSON object, lacks a key, or has no proper string there.
    """
    try:
        lines = chunk.data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = chunk.first_line + chunk.data.count(b"\n", 0, error.start)
        found = chunk.data[error.start : error.start + 1]
        raise ValueError(
            f"{chunk.path}, line {line}: byte {found!r} is not valid UTF-8; convert the file to UTF-8."
        ) from None
    rows = []
    for number, line_text in enumerate(lines, start=chunk.first_line):
        try:
            rows.append(_parse_line(line_text, keys))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{chunk.path}, line {number}: {error}") from None
    return rows


def _parse_line(line: str, keys: Sequence[str]) -> tuple[str, ...]:
    """The texts of one line; errors say what is wrong, without file and line."""
    if not line or line.isspace():
        raise ValueError("blank line between documents; remove it.")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}): {_excerpt(line)}; repair or remove the line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} instead of an object: {_excerpt(line)}.")
    texts = []
    for key in keys:
        if key not in row:
            raise ValueError(f"no key {key!r}, only {sorted(row)[:8]}; check --json-keys.")
        text = row[key]
        if not isinstance(text, str):
            found = "null" if text is None else f"{_excerpt(json.dumps(text))} ({type(text).__name__})"
            raise ValueError(f"{key!r} is {found}, not a string; repair or remove the line.")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = f"\\u{ord(text[error.start]):04x}"
                raise ValueError(f"{key!r} holds half a surrogate pair, {found}; repair the line.") from None
        texts.append(text)
    return tuple(texts)


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")


def _decompressed(name: str) -> Iterator[bytes]:
    """Decompressed blocks of a file, chosen by its ending; the end of every frame is insisted on."""
    path = Path(name)
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty (0 bytes); remove it from the inputs.")
    if name.endswith(".zst"):
        yield from _zstd_blocks(path)
    elif name.endswith(".gz"):
        yield from _gzip_blocks(path)
    else:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                yield block


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read(_READ_BYTES):
                yield block
    except EOFError:
        raise ValueError(f"{path} is cut short: its gzip stream has no end; fetch the file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged gzip ({error}); fetch the file again.") from None


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader stops silently where a file was cut, this does not."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with --long
    frame = None
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            while block:
                frame = frame or context.decompressobj()
                try:
                    data = frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise ValueError(f"{path} is damaged zstd ({error}); fetch the file again.") from None
                if data:
                    yield data
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise ValueError(f"{path} is cut short: its last zstd frame has no end; fetch the file again.")
