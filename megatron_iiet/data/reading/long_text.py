"""Texts of giant lines, decoded part by part.

``json.loads`` of a 50 MB line takes several times its bytes (up to four bytes a character, twice). Here the
line stays as it is: its long string literals are checked, cut out and handed out as :class:`LongText`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_iiet.data.reading.rows import Number, object_of

LONG_LITERAL_BYTES = 1 << 20
_PIECE_BYTES = 1 << 18
_LITERAL = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WHOLE_ESCAPES = re.compile(
    # Half a surrogate pair counts once what follows it is there: its other half, or something else.
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB]).{4}|\\u[dD][89abAB]..(?:\\u[dD][c-fC-F]..|(?=.{6})))*+",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class LongText:
    """A text still in the JSON string literal it came in."""

    raw: bytes = field(repr=False)  # the whole line
    start: int  # where the literal's content begins in the line, behind its opening quote
    stop: int  # where the content ends, at the closing quote
    characters: int
    utf8_bytes: int
    lone_surrogate: str | None  # first half of a surrogate pair without its other half; None in proper text

    @classmethod
    def scan(cls, raw: bytes, start: int, stop: int, piece_bytes: int = _PIECE_BYTES) -> LongText:
        """Check all of a literal without keeping it decoded.

        Raises:
            ValueError: it is not UTF-8 (UnicodeDecodeError) or no proper JSON string.
        """
        characters = utf8_bytes = 0
        lone_surrogate = None
        for piece in _decoded(raw, start, stop, piece_bytes):
            characters += len(piece)
            try:
                utf8_bytes += len(piece) if piece.isascii() else len(piece.encode())
            except UnicodeEncodeError as error:
                lone_surrogate = lone_surrogate or piece[error.start]
        return cls(raw, start, stop, characters, utf8_bytes, lone_surrogate)

    def parts(self, piece_bytes: int = _PIECE_BYTES) -> Iterator[str]:
        """The text, decoded in parts of about ``piece_bytes``."""
        return _decoded(self.raw, self.start, self.stop, piece_bytes)


Text = str | LongText | tuple[str | LongText, ...]
"""Text of a document; of several strings, that are encoded one by one, where it came as a list of them."""


def strings_of(text: Text) -> tuple[str | LongText, ...]:
    """What is encoded one by one."""
    return text if isinstance(text, tuple) else (text,)


def parts_of(text: Text) -> Iterator[str]:
    """A text in parts that can be held; a string that is held already is its only part."""
    for string in strings_of(text):
        if isinstance(string, str):
            yield string
        else:
            yield from string.parts()


def parse_long_line(line: bytes, min_bytes: int = LONG_LITERAL_BYTES) -> Any:
    """The value of a line, but with :class:`LongText` for long values of objects and of lists in them.

    String literals of ``min_bytes`` or more are checked where they are. The rest of the line is parsed with
    short unique stand-ins in their places; those elsewhere, in a key or a list of lists, stay.

    Raises:
        ValueError: the line is not UTF-8 (UnicodeDecodeError) or not JSON.
        RecursionError: it is nested too deeply.
    """
    token = secrets.token_hex(16)
    texts: dict[str, LongText] = {}
    rest = []
    copied = 0
    for start, stop in _literals(line):
        if stop - start >= min_bytes:
            stand_in = f"{token}-{len(texts)}"
            texts[stand_in] = LongText.scan(line, start, stop)
            rest += [line[copied:start], stand_in.encode()]
            copied = stop
    rest.append(line[copied:])

    def put_back(value: Any) -> Any:
        if isinstance(value, list):
            return [texts.get(item, item) if isinstance(item, str) else item for item in value]
        return texts.get(value, value) if isinstance(value, str) else value

    def put_back_all(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return object_of([(key, put_back(value)) for key, value in pairs])

    text = b"".join(rest).decode("utf-8")
    return json.loads(text, object_pairs_hook=put_back_all, parse_int=Number, parse_float=Number)


def _literals(line: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) of the content of every string literal."""
    quote = line.find(b'"')
    while quote >= 0:
        match = _LITERAL.match(line, quote)
        if match is None:  # no search for the next: it would try every quote in the rest
            raise ValueError(f"unterminated string that begins at byte {quote + 1:,}")
        yield quote + 1, match.end() - 1
        quote = line.find(b'"', match.end())


def _decoded(raw: bytes, start: int, stop: int, piece_bytes: int) -> Iterator[str]:
    """Text of a literal's content, decoded in pieces of about ``piece_bytes`` (at least 16)."""
    while start < stop:
        end = stop if stop - start <= piece_bytes else _cut(raw, start, start + piece_bytes)
        try:
            yield json.loads('"' + raw[start:end].decode("utf-8") + '"')
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg.removesuffix(' at')} near byte {start + error.pos:,}") from None
        start = end


def _cut(raw: bytes, start: int, end: int) -> int:
    """The last place up to ``end`` (at most 14 bytes before it) to cut content that begins at ``start``.

    It is inside no UTF-8 sequence, no escape, and no pair of escapes that stand for one character.
    """
    for _ in range(3):
        if raw[end] & 0xC0 == 0x80:
            end -= 1
    match = _WHOLE_ESCAPES.match(raw, start, end)
    assert match
    return match.end()
