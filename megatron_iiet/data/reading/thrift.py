"""Thrift's compact form, as parquet files have it: structs by the numbers of their fields, and what a footer
says of columns.

pyarrow's own objects for columns end the process at a footer whose statistics contradict their types.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12
_LONG = 15  # of a list: its length follows
_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")


class ColumnChunk(NamedTuple):
    """A column of a row group: sizes in bytes, places in the file."""

    path: str
    codec: str
    values: int
    stored_bytes: int
    num_bytes: int
    data_at: int
    dictionary_at: int  # 0: it has none


def column_chunks(footer: bytes) -> list[list[ColumnChunk]]:
    """The columns of every row group.

    Raises:
        ValueError: the footer does not tell them.
    """
    try:
        groups = read_struct(footer, 0)[0].get(4, [])
        return [[_column_chunk(column[3]) for column in group[1]] for group in groups]
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it tells of no column chunks: {type(error).__name__}") from None


def _column_chunk(said: dict[int, Any]) -> ColumnChunk:
    path = b".".join(said[3]).decode()
    return ColumnChunk(path, _CODECS[said[4]], said[5], said[7], said[6], said[9], said.get(11, 0))


def read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct's fields by their numbers, and where it ends.

    Raises:
        ValueError: there is something in it that parquet files do not have.
        IndexError: it goes on behind the end of the data.
    """
    found: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at, step, kind = at + 1, head >> 4, head & 15
        if step:
            number += step
        else:
            number, at = _zigzag(data, at)
        if kind in (_TRUE, _FALSE):
            found[number] = kind == _TRUE
        else:
            found[number], at = _value(data, at, kind)
    return found, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(data, at)
    if kind == _STRUCT:
        return read_struct(data, at)
    if kind == _BINARY:
        return _bytes(data, *_varint(data, at))
    if kind in _LISTS:
        head, at = data[at], at + 1
        size, kind = head >> 4, head & 15
        if size == _LONG:
            size, at = _varint(data, at)
        values = []
        for _ in range(size):
            value, at = _value(data, at, kind)
            values.append(value)
        return values, at
    if kind in (_TRUE, _FALSE, _BYTE):  # in lists booleans take a byte
        return data[at], at + 1
    if kind == _DOUBLE:
        return _bytes(data, 8, at)  # nobody asks for one
    raise ValueError(f"a field of kind {kind}")


def _bytes(data: bytes, size: int, at: int) -> tuple[bytes, int]:
    if at + size > len(data):
        raise IndexError("bytes behind the end")
    return data[at : at + size], at + size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at
