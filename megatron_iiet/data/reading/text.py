"""Rows of files of every kind (:mod:`kinds`), each as a line of JSON.

Nothing is guessed and nothing is dropped silently: a line that is not a JSON object with the wanted texts
gives a :class:`Reject`, which callers raise or count, and a damaged or cut file raises. Blank lines are
allowed at the end of a file only. ``NaN`` and ``Infinity`` may stand where no text is looked for, as Python's
own writer makes them; so may a key that an object has twice.

Reading is in two halves so that workers can share the second: :func:`read_chunks` (decompress, cut at line
ends) and :func:`parse_rows` (JSON, checks).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from megatron_iiet.data.reading import rows, tables
from megatron_iiet.data.reading.compression import decompressed_blocks
from megatron_iiet.data.reading.kinds import DEFAULT, TABLES, Reading, Template
from megatron_iiet.data.reading.long_text import LongText, Text, parse_long_line, parts_of
from megatron_iiet.data.reading.rows import REPEATED, DefectError, Number, object_of
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.tokenizers.base import lone_surrogate

LONG_LINE_BYTES = 8 << 20
"""Longer lines are chunks of their own, and their texts are :class:`LongText`."""

_BOM = b"\xef\xbb\xbf"
_SOURCE = re.compile(r"\w[\w.+ -]{0,99}")


@dataclass(slots=True)
class Chunk:
    """Whole rows of one file."""

    path: str
    first_line: int  # number of the first line or row, counted from 1
    data: bytes  # rows, joined by line breaks; one row if it is longer than LONG_LINE_BYTES
    word: str = "line"  # what a row is called: "row" where it is no line
    defect: DefectError | None = None  # of the only row, which has no data


@dataclass(slots=True)
class Row:
    """The texts of one line."""

    line: int  # number of the line or row in its file, counted from 1
    texts: tuple[Text, ...]  # in the order of the keys asked for
    source: str | None = None  # the string under the source key, fit to be part of a file name


@dataclass(slots=True)
class Reject:
    """A line that gives no row."""

    line: int
    """Number of the line or row in its file, counted from 1."""
    reason: str
    """One of: blank line, byte-order mark, invalid UTF-8, invalid JSON, nested too deeply, not an object,
    missing key, repeated key, not a string, lone surrogate, bad source name, too long; of csv also malformed
    csv, ragged row, NUL."""
    message: str
    """One sentence with file, line, what was found and what to do."""


def iter_documents(inputs: Iterable[InputFile | str | os.PathLike[str]], key: str = "text") -> Generator[str]:
    """Texts of all documents of all files, in order, empty ones included.

    Raises:
        ValueError: a file or line is bad; see the module's description.
    """
    how = Reading(keys=(key,))
    for file in inputs:
        for chunk in read_chunks(file, how):
            found, rejects = parse_rows(chunk, how)
            raise_first(rejects)
            for row in found:
                yield "".join(parts_of(row.texts[0]))


def raise_first(rejects: Sequence[Reject]) -> None:
    """Raise the first reject as a ValueError, if there is any."""
    if rejects:
        raise ValueError(rejects[0].message)


def read_chunks(
    source: InputFile | str | os.PathLike[str], how: Reading = DEFAULT, chunk_bytes: int = 1 << 20
) -> Iterator[Chunk]:
    """Rows of a file or url in chunks of about ``chunk_bytes``.

    A row longer than ``LONG_LINE_BYTES`` is a chunk of its own, and its bytes are held once. Blank lines
    wait until a line with content follows, so those that end a file are dropped.

    Raises:
        ValueError: the file is damaged, cut short, or lacks a column.
        OSError: it cannot be read.
    """
    with open_input(source) as file:
        path = source.path if isinstance(source, InputFile) else os.fspath(source)
        yield from chunks_of(file, path, how, chunk_bytes)


def chunks_of(file: IO[bytes], path: str, how: Reading, chunk_bytes: int) -> Iterator[Chunk]:
    """:func:`read_chunks` of an open file."""
    word = "line" if how.format_of(path) == "jsonl" else "row"
    waiting: list[bytes] = []
    content = size = 0  # rows of these up to the last one that is not blank, and bytes of those
    first = 1
    longest = min(LONG_LINE_BYTES, how.max_document_bytes)
    for line in _json_lines(file, path, how):
        is_blank = isinstance(line, bytes) and (not line or line.isspace())
        if isinstance(line, DefectError) or (len(line) > longest and not is_blank):
            if waiting:
                yield Chunk(path, first, b"\n".join(waiting), word)
            first += len(waiting)
            if isinstance(line, bytes) and len(line) <= how.max_document_bytes:
                yield Chunk(path, first, line, word)
            else:
                defect = rows.too_long(len(line), how.max_document_bytes) if isinstance(line, bytes) else line
                yield Chunk(path, first, b"", word, defect)
            first += 1
            waiting, content, size = [], 0, 0
            line = b""  # what comes next may be as giant
            continue
        waiting.append(line)
        if not is_blank:
            content, size = len(waiting), size + len(line) + 1
        if size > chunk_bytes:
            yield Chunk(path, first, b"\n".join(waiting), word)
            first += len(waiting)
            waiting, content, size = [], 0, 0
    if content:
        yield Chunk(path, first, b"\n".join(waiting[:content]), word)


def _json_lines(file: IO[bytes], path: str, how: Reading) -> Iterator[bytes | DefectError]:
    """Every row as a line of JSON, or what is wrong with it; none of a file of no bytes."""
    kind, limit = how.format_of(path), how.max_document_bytes
    if kind in TABLES:
        if file.seek(0, 2) == 0:
            return iter(())
        file.seek(0)
        read = tables.parquet_rows if kind == "parquet" else tables.arrow_rows
        return read(file, path, how.columns)
    start, rest = rows.without_mark(decompressed_blocks(file, path))
    if kind == "json" and start.lstrip().startswith(b"["):
        return rows.array_items(chain([start.lstrip()[1:]], rest), path, limit)
    blocks = chain([start], rest)
    if kind == "txt":
        tables.present(path, how.columns, ["text"])
        return rows.documents_of_text(blocks, how.txt_documents, limit)
    lines = rows.lines(blocks, limit)
    if kind in ("csv", "tsv"):
        return tables.csv_rows(lines, path, "," if kind == "csv" else "\t", how.columns, limit)
    return lines


def parse_rows(chunk: Chunk, how: Reading = DEFAULT) -> tuple[list[Row], list[Reject]]:
    """The texts under the keys, or the one that the template makes, of every row of a chunk, and its source.

    A text is a string or, as Megatron-LM takes it, a list of strings. A key may lead into nested objects with
    dots (``meta.redpajama_set_name``); a key that is there literally, dots and all, comes first. Nothing is
    raised for bad rows.
    """
    found: list[Row] = []
    rejects: list[Reject] = []
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        try:
            if chunk.defect:
                raise chunk.defect
            row = _parse_line(line)
            texts: Iterable[Text] = (
                [_text(row, key) for key in how.keys] if not how.template else (_filled(row, how.template),)
            )
            found.append(Row(number, tuple(texts), how.source_key and _source(row, how.source_key)))
        except DefectError as error:
            rejects.append(Reject(number, error.reason, f"{chunk.path}, {chunk.word} {number}: {error}"))
    return found, rejects


def _parse_line(line: bytes) -> dict[str, Any]:
    """The object of a line, with :class:`LongText` for giant strings of a giant line."""
    try:
        value = _load(line) if len(line) <= LONG_LINE_BYTES else parse_long_line(line)
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise DefectError(
            "invalid UTF-8", f"byte {found!r} is not valid UTF-8; convert the file to UTF-8."
        ) from None
    except RecursionError:
        raise DefectError(
            "nested too deeply",
            f"lists and objects lie more than about {sys.getrecursionlimit():,} deep in one another, which "
            f"is not read whatever else it holds: {_excerpt(line)}; flatten or remove them.",
        ) from None
    except ValueError as error:
        raise _json_error(line, error) from None
    if not isinstance(value, dict):
        raise DefectError("not an object", f"a JSON {_kind(value)} instead of an object: {_excerpt(line)}.")
    return value


_decoder = json.JSONDecoder(parse_int=Number, parse_float=Number, object_pairs_hook=object_of)


def _load(line: bytes) -> Any:
    """The value of a line; nearly twice as fast where nothing is around it.

    Lines are decoded one by one: a chunk decoded whole takes two bytes a character as soon as one of its
    characters is a dash.
    """
    text = line.decode("utf-8")
    try:
        value, end = _decoder.raw_decode(text)
    except ValueError:
        return _decoder.decode(text)
    return value if end == len(text) or text[end:] == "\r" else _decoder.decode(text)


def _json_error(line: bytes, error: Exception) -> DefectError:
    if not line or line.isspace():
        return DefectError("blank line", "blank line between documents; remove it.")
    if line.startswith(_BOM):
        return DefectError("byte-order mark", "starts with a byte-order mark; save it as UTF-8 without BOM.")
    return DefectError(
        "invalid JSON", f"not valid JSON ({error}): {_excerpt(line)}; repair or remove the line."
    )


def _source(row: dict[str, Any], key: str) -> str:
    name = _checked(_value(row, key, "--split-by"), key)
    if isinstance(name, LongText):
        raise DefectError("not a string", f"{key!r} holds {name.characters:,} characters, not a name.")
    if not _SOURCE.fullmatch(name):
        raise DefectError(
            "bad source name",
            f"{key!r} is {name!r}, which cannot be part of a file name; use letters, digits and . _ + - "
            "only.",
        )
    return name


def _text(row: dict[str, Any], key: str) -> Text:
    """The text under a key."""
    value = _value(row, key, "--json-keys")
    if not isinstance(value, list):
        return _checked(value, key)
    # Empty strings have no ids, and a single string is that text.
    texts = [text for number, item in enumerate(value) if (text := _checked(item, f"{key}[{number}]"))]
    return tuple(texts) if len(texts) > 1 else texts[0] if texts else ""


def _filled(row: dict[str, Any], template: Template) -> str:
    """The text that a template makes of a row."""
    parts = []
    for literal, key in template:
        parts.append(literal)
        if key is None:
            continue
        value = _value(row, key, "--text-template")
        if isinstance(value, Number):
            parts.append(value)
        elif isinstance(value, bool):
            parts.append(json.dumps(value))
        else:
            parts += parts_of(_checked(value, key))
    return "".join(parts)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {"Number": "number", "float": "number", "bool": "boolean", "NoneType": "null", "dict": "object"}
    name = type(value).__name__
    return "string" if isinstance(value, str | LongText) and name not in names else names.get(name, name)


def _checked(text: Any, key: str) -> str | LongText:
    """What is found under a key, if it is a proper text."""
    half = None
    if isinstance(text, LongText):
        half = text.lone_surrogate
    elif isinstance(text, str) and not isinstance(text, Number):
        if not text.isascii() and (at := lone_surrogate(text)) is not None:
            half = text[at]
    else:
        found = "null" if text is None else f"{_json_excerpt(text)} ({_kind(text)})"
        raise DefectError("not a string", f"{key!r} is {found}, not a string; repair or remove it.")
    if half:
        raise DefectError(
            "lone surrogate", f"{key!r} holds half a surrogate pair, \\u{ord(half):04x}; repair the text."
        )
    return text


def _value(row: dict[str, Any], key: str, option: str) -> Any:
    """The value that a key with dots leads to, or one of that very name."""
    value: Any = row
    for name in [key] if key in row else key.split("."):
        if not isinstance(value, dict) or name not in value:
            found = str(sorted(value)[:8])[:200] if isinstance(value, dict) else _json_excerpt(value)
            raise DefectError("missing key", f"no key {key!r}, only {found}; check {option}.")
        value = value[name]
        if value is REPEATED:
            raise DefectError("repeated key", f"{key!r} is there more than once; keep one of them.")
    return value


def _json_excerpt(value: Any) -> str:
    return _excerpt(value if isinstance(value, Number) else json.dumps(value, default=repr))


def _excerpt(line: bytes | str) -> str:
    text = line[:240].decode("utf-8", "replace") if isinstance(line, bytes) else line
    return repr(text if len(text) <= 60 else text[:57] + "...")
