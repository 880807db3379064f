"""Rows cut out of blocks of text, each as a line of JSON: lines, items of arrays, documents of plain text.

A row is held once, and one that is too long not at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

_BOM = b"\xef\xbb\xbf"
_START_BYTES = 1 << 16
_ESCAPES = ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t"))
_CONTROLS = bytes(range(32))
_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class DefectError(ValueError):
    """A row's defect, without file and number; ``size``: bytes of one that is too long."""

    def __init__(self, reason: str, message: str, size: int = 0) -> None:
        super().__init__(reason, message, size)  # all: it is sent to workers
        self.reason, self.message, self.size = reason, message, size

    def __str__(self) -> str:
        return self.message


class Number(str):
    """A number as the text has it: it is no text of a document, and none is too large or too exact."""

    __slots__ = ()


REPEATED = object()
"""What stands under a key that an object has several times."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object by its keys and values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        found |= {key: REPEATED for key in found if times[key] > 1}
    return found


def too_long(size: int, limit: int) -> DefectError:
    """The defect of a row of more bytes than are held."""
    found = f"{size:,} bytes, more than the {limit:,} of --max-document-bytes; raise that or split it."
    return DefectError("too long", found, size)


class _Row:
    """A row whose end is to come."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begin()

    def _begin(self) -> None:
        self._bytes, self.size = BytesIO(), 0

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= self._limit:
            self._bytes.write(data)
        else:
            self._bytes = BytesIO()

    def end(self) -> bytes | DefectError:
        """The row, whose buffer is handed out itself, not a copy of it."""
        row: bytes | DefectError = self._bytes.getvalue()
        if self.size > self._limit:
            row = too_long(self.size, self._limit)
        self._begin()
        return row


def without_mark(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The start of a file, up to something that is no space, without a byte-order mark; and the rest."""
    start = b""
    for block in blocks:
        start += block
        if len(start) >= _START_BYTES or (len(start) >= len(_BOM) and start.removeprefix(_BOM).strip()):
            break
    return start.removeprefix(_BOM), blocks


def lines(blocks: Iterable[bytes], limit: int) -> Iterator[bytes | DefectError]:
    """Lines without their breaks."""
    row = _Row(limit)
    for block in blocks:
        end, *whole = block.split(b"\n")
        row.add(end)
        if whole:
            yield row.end()
            rest = whole.pop()
            yield from whole  # no longer than a block
            row.add(rest)
    if row.size:
        yield row.end()


def array_items(blocks: Iterable[bytes], path: str, limit: int) -> Iterator[bytes | DefectError]:
    """Items of a JSON array, as they stand in the file, from what follows its opening bracket.

    Whoever parses them finds what is wrong with them. Line breaks become carriage returns: white space still,
    and within strings as wrong as they were.

    Raises:
        ValueError: the array has no end, or something follows it.
    """
    row = _Row(limit)
    depth, in_string, rest = 1, False, b""
    for block in blocks:
        block, rest, begin, at = (rest + block).replace(b"\n", b"\r"), b"", 0, 0
        while at < len(block) and depth:
            if in_string:
                string = _IN_STRING.match(block, at)
                assert string
                at = string.end()
                if block[at : at + 1] == b"\\":  # what it escapes is in the next block
                    block, rest = block[:at], block[at:]
                in_string = at == len(block)
                at += 1
            elif found := _STRUCTURE.search(block, at):
                mark, at = found[0], found.end()
                in_string = mark == b'"'
                depth += (mark in b"[{") - (mark in b"]}")
                if (mark == b"," and depth == 1) or (mark == b"]" and depth == 0):
                    row.add(block[begin : at - 1] if row.size else block[begin : at - 1].lstrip())
                    yield row.end()
                    begin = at
            else:
                break
        rest_of_block = block[begin:] if row.size else block[begin:].lstrip()
        if depth == 0 and rest_of_block:
            raise ValueError(f"{path}: {rest_of_block[:40]!r} is where its JSON array ends; remove it.")
        row.add(rest_of_block)
    if depth:
        raise ValueError(f"{path} is cut short: its JSON array has no end; fetch the file again.")


def documents_of_text(blocks: Iterable[bytes], between: str, limit: int) -> Iterator[bytes | DefectError]:
    """Documents of plain text: all of it, exactly, or what stands between blank lines (``blank-line``)."""
    row = _Row(limit)

    def add(text: bytes) -> None:
        row.add((b"" if row.size else b'{"text": "') + escaped(text))

    def end() -> bytes | DefectError:
        row.add(b'"}')
        return row.end()

    line_end = b""
    for part in blocks if between == "file" else lines(blocks, limit):
        if isinstance(part, DefectError):
            row.size += part.size  # its document is too long as well
        elif between == "file":
            if part:
                add(part)
        elif part.strip():
            add((line_end if row.size else b"") + part.removesuffix(b"\r"))
            line_end = b"\r\n" if part.endswith(b"\r") else b"\n"
        elif row.size:
            yield end()
    if row.size:
        yield end()


def escaped(text: bytes) -> bytes:
    """What stands between the quotes of a JSON string for a text; bytes that are no UTF-8 stay."""
    for plain, escape in _ESCAPES:
        text = text.replace(plain, escape)
    if len(text.translate(None, _CONTROLS)) < len(text):  # six times as fast as to search for them
        text = re.sub(rb"[\x00-\x1f]", lambda match: b"\\u%04x" % ord(match[0]), text)
    return text
