"""Giant texts in the dictionary pages of parquet files, which pyarrow would hold three times.

Before a row group is read its giant texts go to a file, as JSON has them, and short unique stand-ins are in
their places in what pyarrow reads; rows get them back one by one. What is not understood for certain (a page
of another form, a codec, a type) is left to pyarrow.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from megatron_iiet.data.reading.rows import escaped
from megatron_iiet.data.reading.thrift import ColumnChunk, read_struct

GIANT_BYTES = 8 << 20
"""Of a page: smaller ones are left as they are."""
_TEXT_BYTES = 1 << 20  # of a text that goes to the file
_PIECE_BYTES = 1 << 20
_HEADER_BYTES = 1 << 10
_CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_DICTIONARY_PAGE, _PLAIN, _PLAIN_DICTIONARY = 2, 0, 2


class _Page(NamedTuple):
    """A page that stands for bytes [start, end) of a file; up to ``stop`` what is behind it moves up."""

    start: int
    end: int
    stop: int
    content: bytes


class _Header(NamedTuple):
    """What is said of a dictionary page."""

    start: int
    """Where its content starts."""
    num_bytes: int
    stored_bytes: int
    values: int
    encoding: int


def dictionary_bytes(file: IO[bytes], chunk: ColumnChunk) -> int:
    """Size of the dictionary of a column; 0 where its page is not understood."""
    header = _header(file, chunk)
    return header.num_bytes if header else 0


def _header(file: IO[bytes], chunk: ColumnChunk) -> _Header | None:
    if not 0 < chunk.dictionary_at < chunk.data_at:
        return None
    file.seek(chunk.dictionary_at)
    try:
        page, size = read_struct(file.read(_HEADER_BYTES), 0)
        start = chunk.dictionary_at + size
        header = _Header(start, page[2], page[3], page[7][1], page[7][2])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    known = page[1] == _DICTIONARY_PAGE and header.encoding in (_PLAIN, _PLAIN_DICTIONARY)
    return header if known and start + header.stored_bytes == chunk.data_at else None


class Slimmed:
    """A parquet file, open for reading, without the giant texts of a row group's dictionaries."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at = file, 0
        self._pages: list[_Page] = []
        self._texts = TemporaryFile()  # noqa: SIM115 closed by close
        self._places: list[tuple[int, int]] = []  # where each text begins and ends there
        self._token = secrets.token_hex(16).encode()
        self.closed = False

    def slim(self, chunk: ColumnChunk) -> bool:
        """Take the giant texts, if there are any, out of the dictionary of a column; False: that is not
        understood."""
        import pyarrow as pa

        header = _header(self._file, chunk)
        if header is None or chunk.codec not in _CODECS:
            return False
        codec = _CODECS[chunk.codec]
        self._file.seek(header.start)
        stored: Any = self._file.read(header.stored_bytes)
        if codec:
            stored = pa.Codec(codec).decompress(stored, header.num_bytes)
        known = len(self._places)
        slim = self._without_giants(memoryview(stored), header.values)
        del stored
        if slim is None or len(self._places) == known:  # a page of many small texts is not held
            return slim is not None
        body = pa.Codec(codec).compress(slim, asbytes=True) if codec else slim
        sizes = _integer(_DICTIONARY_PAGE) + _integer(len(slim)) + _integer(len(body))
        end = b"\x4c" + _integer(header.values) + _integer(header.encoding) + b"\0\0"
        start, stop = chunk.dictionary_at, chunk.dictionary_at + chunk.stored_bytes
        self._pages.append(_Page(start, chunk.data_at, stop, sizes + end + body))
        return True

    def _without_giants(self, values: memoryview, number: int) -> bytes | None:
        """Values of a dictionary, each behind its length, with stand-ins; None: they are something else."""
        parts: list[bytes] = []
        at = 0
        while at < len(values):
            begin, at = at + 4, at + 4 + int.from_bytes(values[at : at + 4], "little")
            if at > len(values):
                break
            if at - begin <= _TEXT_BYTES:
                value = bytes(values[begin:at])
            else:
                value = b"%b-%d." % (self._token, len(self._places))
                place = self._texts.tell()
                for piece in range(begin, at, _PIECE_BYTES):
                    self._texts.write(escaped(bytes(values[piece : min(at, piece + _PIECE_BYTES)])))
                self._places.append((place, self._texts.tell()))
            parts += [len(value).to_bytes(4, "little"), value]
        return b"".join(parts) if (at, len(parts)) == (len(values), 2 * number) else None

    def filled(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        """Rows as lines of JSON, with the texts in the places of their stand-ins."""
        for row in rows:
            if self._token not in row:
                yield row
                continue
            with TemporaryFile() as file:  # so that it is held once
                head, *others = row.split(self._token + b"-")
                file.write(head)
                for other in others:
                    name, rest = other.split(b".", 1)
                    file.writelines(self._pieces(*self._places[int(name)]))
                    file.write(rest)
                size = file.tell()
                file.seek(0)
                yield file.read(size)

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        self._texts.seek(start)
        for at in range(start, end, _PIECE_BYTES):
            yield self._texts.read(min(_PIECE_BYTES, end - at))

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on; fewer at the end alone."""
        assert size >= 0, "pyarrow asks for some bytes"
        parts = []
        while size and (part := self._part(size)):
            parts.append(part)
            size -= len(part)
            self._at += len(part)
        return b"".join(parts)

    def _part(self, size: int) -> bytes:
        """Bytes that are in one place."""
        moved = 0
        for page in self._pages:
            if self._at < page.start:
                size = min(size, page.start - self._at)
            elif self._at < page.start + len(page.content):
                return page.content[self._at - page.start :][:size]
            elif self._at < page.stop:
                moved = page.end - page.start - len(page.content)
                size = min(size, page.stop - self._at)
        self._file.seek(self._at + moved)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = self._file.seek(0, whence) + offset if whence == 2 else offset + self._at * whence
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._texts.close()
        self.closed = True


def _integer(value: int) -> bytes:
    """A field behind another one, with an integer that is not negative."""
    content, value = bytearray(b"\x15"), 2 * value
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    return bytes([*content, value])
