"""Rows of files of JSON lines: ``.jsonl``, ``.json``, ``.ndjson``, plain or packed as ``.gz`` or ``.zst``.

Nothing is guessed and nothing is dropped silently: a line that is not a JSON object with the wanted texts
gives a :class:`Reject`, which callers raise or count, and a damaged or cut file raises. Blank lines are
allowed at the end of a file only. Of a key given twice in one object the last value counts; ``NaN`` and
``Infinity`` are accepted as numbers, as Python's own writer makes them.

Reading is in two halves so that workers can share the second: :func:`read_chunks` (decompress, cut at line
ends) and :func:`parse_rows` (JSON, checks).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from megatron_iiet.data.reading.compression import decompressed_blocks
from megatron_iiet.data.reading.long_text import LongText, parse_long_line, parts_of
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.tokenizers.base import lone_surrogate

LONG_LINE_BYTES = 8 << 20
"""Longer lines are chunks of their own, and their texts are :class:`LongText`."""

_BOM = b"\xef\xbb\xbf"
_SOURCE = re.compile(r"\w[\w.+ -]{0,99}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of one file."""

    path: str
    first_line: int  # number of the first line, counted from 1
    data: bytes  # lines joined by line breaks; one line if it is longer than LONG_LINE_BYTES


@dataclass(slots=True)
class Row:
    """The texts of one line."""

    line: int  # number of the line in its file, counted from 1
    texts: tuple[str | LongText, ...]  # in the order of the keys asked for
    source: str | None = None  # the string under the source key, fit to be part of a file name


@dataclass(slots=True)
class Reject:
    """A line that gives no row."""

    line: int
    """Number of the line in its file, counted from 1."""
    reason: str
    """One of: blank line, byte-order mark, invalid UTF-8, invalid JSON, not an object, missing key, not a
    string, lone surrogate, bad source name."""
    message: str
    """One sentence with file, line, what was found and what to do."""


def iter_documents(inputs: Iterable[InputFile | str | os.PathLike[str]], key: str = "text") -> Iterator[str]:
    """Texts of all documents of all files, in order, empty ones included.

    Raises:
        ValueError: a file or line is bad; see the module's description.
    """
    for file in inputs:
        for chunk in read_chunks(file):
            rows, rejects = parse_rows(chunk, [key])
            raise_first(rejects)
            for row in rows:
                yield "".join(parts_of(row.texts[0]))


def raise_first(rejects: Sequence[Reject]) -> None:
    """Raise the first reject as a ValueError, if there is any."""
    if rejects:
        raise ValueError(rejects[0].message)


def read_chunks(source: InputFile | str | os.PathLike[str], chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """Whole lines of a file or url in chunks of about ``chunk_bytes``.

    A line longer than ``LONG_LINE_BYTES`` is a chunk of its own, and its bytes are held once. Blank lines
    wait until a line with content follows, so those that end a file are dropped.

    Raises:
        ValueError: its compression is damaged or cut short.
        OSError: it cannot be read.
    """
    path = source.path if isinstance(source, InputFile) else os.fspath(source)
    waiting: list[bytes] = []
    content = size = 0  # lines of these up to the last one that is not blank, and bytes of those
    first_line = 1
    with open_input(source) as file:
        for line in _lines(decompressed_blocks(file, path)):
            is_blank = not line or line.isspace()
            if len(line) > LONG_LINE_BYTES and not is_blank:
                if waiting:
                    yield Chunk(path, first_line, b"\n".join(waiting))
                yield Chunk(path, first_line + len(waiting), line)
                first_line += len(waiting) + 1
                waiting, content, size = [], 0, 0
                continue
            waiting.append(line)
            if not is_blank:
                content, size = len(waiting), size + len(line) + 1
            if size > chunk_bytes:
                yield Chunk(path, first_line, b"\n".join(waiting))
                first_line += len(waiting)
                waiting, content, size = [], 0, 0
        if content:
            yield Chunk(path, first_line, b"\n".join(waiting[:content]))


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of consecutive blocks, without their breaks; a giant one is held once."""
    begun = BytesIO()  # a line whose end is to come
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            begun.write(end)
            yield begun.getvalue()  # the buffer itself, not a copy of it
            begun = BytesIO()
        begun.write(rest)
    if begun.tell():
        yield begun.getvalue()


def parse_rows(
    chunk: Chunk, keys: Sequence[str], source_key: str | None = None
) -> tuple[list[Row], list[Reject]]:
    """The strings under ``keys``, and under ``source_key``, of every line of a chunk.

    A key may lead into nested objects with dots (``meta.redpajama_set_name``); a key that is there literally,
    dots and all, comes first. Nothing is raised for bad lines.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        try:
            row = _parse_line(line)
            texts = tuple([_string(row, key, "--json-keys") for key in keys])
            source = source_key and _source(row, source_key)
            rows.append(Row(number, texts, source))
        except _BadLineError as error:
            rejects.append(Reject(number, error.reason, f"{chunk.path}, line {number}: {error}"))
    return rows, rejects


class _BadLineError(ValueError):
    """A line's defect, without file and line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _parse_line(line: bytes) -> dict[str, Any]:
    """The object of a line, with :class:`LongText` for giant strings of a giant line."""
    try:
        value = _load(line) if len(line) <= LONG_LINE_BYTES else parse_long_line(line)
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise _BadLineError(
            "invalid UTF-8", f"byte {found!r} is not valid UTF-8; convert the file to UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _json_error(line, error) from None
    if not isinstance(value, dict):
        raise _BadLineError(
            "not an object", f"a JSON {type(value).__name__} instead of an object: {_excerpt(line)}."
        )
    return value


_raw_decode = json.JSONDecoder().raw_decode


def _load(line: bytes) -> Any:
    """``json.loads``; nearly twice as fast where nothing is around the value.

    Lines are decoded one by one: a chunk decoded whole takes two bytes a character as soon as one of its
    characters is a dash.
    """
    text = line.decode("utf-8")
    try:
        value, end = _raw_decode(text)
    except ValueError:
        return json.loads(text)
    return value if end == len(text) or text[end:] == "\r" else json.loads(text)


def _json_error(line: bytes, error: Exception) -> _BadLineError:
    if not line or line.isspace():
        return _BadLineError("blank line", "blank line between documents; remove it.")
    if line.startswith(_BOM):
        return _BadLineError(
            "byte-order mark", "starts with a byte-order mark; save it as UTF-8 without BOM."
        )
    return _BadLineError(
        "invalid JSON", f"not valid JSON ({error}): {_excerpt(line)}; repair or remove the line."
    )


def _source(row: dict[str, Any], key: str) -> str:
    name = _string(row, key, "--split-by")
    if isinstance(name, LongText):
        raise _BadLineError("not a string", f"{key!r} holds {name.characters:,} characters, not a name.")
    if not _SOURCE.fullmatch(name):
        raise _BadLineError(
            "bad source name",
            f"{key!r} is {name!r}, which cannot be part of a file name; use letters, digits and . _ + - "
            "only.",
        )
    return name


def _string(row: dict[str, Any], key: str, option: str) -> str | LongText:
    """The text under a key; ``option`` is where the user gave the key."""
    text = row[key] if key in row else _nested(row, key, option)
    half = None
    if isinstance(text, LongText):
        half = text.lone_surrogate
    elif isinstance(text, str):
        if not text.isascii() and (at := lone_surrogate(text)) is not None:
            half = text[at]
    else:
        found = "null" if text is None else f"{_json_excerpt(text)} ({type(text).__name__})"
        raise _BadLineError("not a string", f"{key!r} is {found}, not a string; repair or remove the line.")
    if half:
        raise _BadLineError(
            "lone surrogate", f"{key!r} holds half a surrogate pair, \\u{ord(half):04x}; repair the line."
        )
    return text


def _nested(row: dict[str, Any], key: str, option: str) -> Any:
    """The value that a key with dots leads to."""
    value: Any = row
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            found = str(sorted(value)[:8])[:200] if isinstance(value, dict) else _json_excerpt(value)
            raise _BadLineError("missing key", f"no key {key!r}, only {found}; check {option}.")
        value = value[name]
    return value


def _json_excerpt(value: Any) -> str:
    return _excerpt(json.dumps(value, default=repr))


def _excerpt(line: bytes | str) -> str:
    text = line[:240].decode("utf-8", "replace") if isinstance(line, bytes) else line
    return repr(text if len(text) <= 60 else text[:57] + "...")
