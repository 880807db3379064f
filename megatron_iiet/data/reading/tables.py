"""Rows of parquet, arrow and csv files as the JSON that lines have, with the columns that are looked at."""

from __future__ import annotations

import csv
import itertools
import json
import os
import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from megatron_iiet.data.reading.dictionaries import GIANT_BYTES, Slimmed, dictionary_bytes
from megatron_iiet.data.reading.rows import DefectError, escaped
from megatron_iiet.data.reading.thrift import ColumnChunk, column_chunks

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 1 << 10
_BUFFER_BYTES = 1 << 18
_CLOSING_BYTES = 32 << 20  # of one that is worth reading the row group anew, for what its reader keeps
_PIECE_BYTES = 1 << 20
_MARK = b"\xff\xff\xff\xff"
_END = _MARK + bytes(4)
_PARQUET, _ARROW = b"PAR1", b"ARROW1"  # how files begin and end
_LENGTH_BYTES = 4  # of the footer's length, behind it

# Read when pyarrow is loaded. Arrow would keep what a giant document took, else.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "0")


def parquet_rows(file: IO[bytes], path: str, columns: Sequence[str]) -> Iterator[bytes]:
    """Rows of a parquet file.

    Raises:
        ValueError: it is damaged or cut short, or lacks a column.
    """
    import pyarrow.parquet as pq

    with _damage(path, "parquet"):
        table = pq.ParquetFile(file)
        found = table.schema_arrow.names
    footer = _footer(file)
    try:
        groups = column_chunks(footer)
    except ValueError as error:
        raise ValueError(f"{path}: its footer is damaged ({error}); fetch it again.") from None
    _refuse_lost_rows(path, table.metadata, groups)
    end = max((_end(chunk) for chunk in groups[-1]), default=0) if groups else 0
    _refuse_joined(file, path, _PARQUET, end or len(_PARQUET), len(footer) + _LENGTH_BYTES)
    names = present(path, columns, found)
    texts = {field.name for field in table.schema_arrow if _is_text(field.type)}
    for number, chunks in enumerate(groups):
        chunks = [chunk for chunk in chunks if not {chunk.path, chunk.path.split(".")[0]}.isdisjoint(names)]
        with _damage(f"{path}, row group {number}", "parquet"):
            yield from _rows_of_group(file, table.metadata, number, chunks, names, texts)


def _footer(file: IO[bytes]) -> bytes:
    end = file.seek(-_LENGTH_BYTES - len(_PARQUET), 2)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    file.seek(end - length)
    return file.read(length)


def _refuse_lost_rows(path: str, metadata: Any, chunks: list[list[ColumnChunk]]) -> None:
    """Refuse a footer whose numbers of rows contradict each other: readers go by one, and say nothing."""
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows:
        raise ValueError(
            f"{path} is damaged: its footer tells of {metadata.num_rows:,} rows, and of {sum(rows):,} in row "
            "groups; fetch it again."
        )
    columns = map(metadata.schema.column, range(metadata.num_columns))
    is_list = [column.max_repetition_level > 0 for column in columns]
    for number, (expected, group) in enumerate(zip(rows, chunks, strict=True)):
        if len(group) != len(is_list):
            raise ValueError(
                f"{path}, row group {number} is damaged: {len(group):,} columns, but the schema has "
                f"{len(is_list):,}; fetch it again."
            )
        for chunk, skip in zip(group, is_list, strict=True):
            if not skip and chunk.values != expected:
                raise ValueError(
                    f"{path}, row group {number} is damaged: {expected:,} rows, but {chunk.values:,} values "
                    "in a column; fetch it again."
                )


def _rows_of_group(
    file: IO[bytes],
    metadata: Any,
    number: int,
    chunks: list[ColumnChunk],
    names: list[str],
    texts: Container[str],
) -> Iterator[bytes]:
    """Rows of a row group; ``chunks``: of the columns that are read, ``texts``: those that hold nothing but
    strings."""
    read = partial(_batches, metadata=metadata, group=number, names=names)
    rows = _some_rows(metadata.row_group(number).num_rows, sum(chunk.num_bytes for chunk in chunks))
    giants = [
        chunk
        for chunk in chunks
        if chunk.num_bytes > GIANT_BYTES and dictionary_bytes(file, chunk) > GIANT_BYTES
    ]
    if not giants:
        yield from _lines(read(file, rows=rows))
        return
    with closing(Slimmed(file)) as slimmed:
        if all(chunk.path in texts and slimmed.slim(chunk) for chunk in giants):
            yield from slimmed.filled(_lines(read(slimmed, rows=rows)))
        else:  # a batch of several rows, of which one is giant, grows to twice its size
            yield from _lines(read(file, rows=1))


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _batches(file: Any, metadata: Any, group: int, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of a row group. A reader keeps the pages that it reads, and its last batch: before a giant one
    is handed out it is closed, and another one goes on behind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    done, more = 0, True
    while more:
        table = pq.ParquetFile(
            file,
            metadata=metadata,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,  # of pages that have one
        )
        batches = table.iter_batches(rows, [group], names, use_threads=False)
        behind, more = done, False
        while not more and (batch := next(batches, None)) is not None:
            if behind:  # the same batches as before
                behind -= batch.num_rows
                continue
            done += batch.num_rows
            held = [batch]
            del batch
            if more := held[0].nbytes > _CLOSING_BYTES:
                del table, batches
            yield held.pop()
    if done != (expected := metadata.row_group(group).num_rows):  # pyarrow skips pages of unknown kinds
        raise pa.ArrowInvalid(f"it holds {done:,} rows, but its footer tells of {expected:,}")


def _end(chunk: ColumnChunk) -> int:
    return (chunk.dictionary_at or chunk.data_at) + chunk.stored_bytes


def _arrow_end(footer: bytes) -> int:
    """Where the last record batch ends, by the fourth field of the footer's table, a flatbuffer."""

    def number(kind: str, at: int) -> int:
        return int(struct.unpack_from(kind, footer, at)[0])

    table = number("<I", 0)
    fields = table - number("<i", table)
    if number("<H", fields) < 12 or not (place := number("<H", fields + 10)):
        return 0
    blocks = table + place + number("<I", table + place)
    kind = np.dtype([("at", "<i8"), ("head", "<i4"), ("_", "<i4"), ("body", "<i8")])
    found = np.frombuffer(footer, kind, number("<I", blocks), blocks + 4)
    return int((found["at"] + found["head"] + found["body"]).max(initial=0))


def _refuse_joined(file: IO[bytes], path: str, mark: bytes, end: int, footer: int) -> None:
    """Refuse several files one behind the other: only the last one's rows would be found.

    Where its data ends is counted from its own beginning. Between there and its footer are indexes, or as
    many bytes as there are in front of it: the others, with their marks at both ends.

    Args:
        end: where the data ends.
        footer: bytes of what follows the data, without the mark.

    Raises:
        ValueError: this is such a file.
    """
    left, behind = file.seek(0, 2) - footer - len(mark) - end, b""
    file.seek(0)
    while left > 0 and (block := file.read(min(left, _PIECE_BYTES) + 2 * len(mark))):
        if 2 * mark in behind + block:
            raise ValueError(
                f"{path} holds several files, one behind the other, of which only the last one would be "
                "read; give each by itself."
            )
        left, behind = left - len(block), block[-2 * len(mark) :]
    file.seek(0)


def parquet_row_count(file: IO[bytes], path: str) -> int:
    """Rows of a parquet file.

    Raises:
        ValueError: it is damaged or cut short.
    """
    import pyarrow.parquet as pq

    with _damage(path, "parquet"):
        return int(pq.ParquetFile(file).metadata.num_rows)


def arrow_rows(file: IO[bytes], path: str, columns: Sequence[str]) -> Iterator[bytes]:
    """Rows of an Arrow file or, as Hugging Face's ``save_to_disk`` writes them, stream.

    Raises:
        ValueError: it is damaged or cut short, or lacks a column.
    """
    import pyarrow as pa

    head, size = file.read(6), file.seek(0, 2)
    is_stream = head != _ARROW
    if is_stream:
        file.seek(max(0, size - 8))
        # Streams of Arrow before 0.15 have no mark before each length.
        if not file.read().endswith(_END if head.startswith(_MARK) else _END[4:]):
            raise ValueError(f"{path} is cut short: its Arrow stream has no end; fetch the file again.")
    else:  # Said here: a thread of pyarrow's that finds it may outlive the interpreter, which then aborts.
        file.seek(-len(_ARROW), 2)
        if file.read() != _ARROW:
            raise ValueError(f"{path} is cut short: its Arrow file has no end; fetch it again.")
    file.seek(0)
    open_it = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    with _damage(path, "arrow"):
        schema = open_it(file).schema
        found = schema.names
    if not is_stream:
        file.seek(-_LENGTH_BYTES - len(_ARROW), 2)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little") + _LENGTH_BYTES
        file.seek(-length - len(_ARROW), 2)
        _refuse_joined(file, path, _ARROW, _arrow_end(file.read(length)), length)
    names = present(path, columns, found)
    file.seek(0)
    with _damage(path, "arrow"):
        options = pa.ipc.IpcReadOptions(included_fields=sorted(map(found.index, names)), use_threads=False)
        reader = open_it(file, options=options)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        yield from _lines(iter(batches))
    while is_stream and file.tell() < size:  # several streams, one behind the other
        start = file.tell()
        with _damage(path, "arrow"):
            more = open_it(file)
        if not more.schema.equals(schema):
            raise ValueError(
                f"{path} holds several Arrow streams, from byte {start:,} on with other columns or types; "
                "write one file of each."
            )
        with _damage(path, "arrow"):
            yield from _lines(batch.select(names) for batch in more)


@contextmanager
def _damage(place: str, kind: str) -> Iterator[None]:
    """Turns the library's errors into sentences; those of a disk or network stay."""
    import pyarrow as pa

    try:
        yield
    # A damaged length makes pyarrow ask Python for a negative number of bytes: SystemError.
    except (pa.ArrowException, OSError, UnicodeDecodeError, SystemError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{place}: no {kind} file, or damaged or cut short ({text}); fetch it again."
        ) from None


def present(path: str, columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns that hold the keys.

    Raises:
        ValueError: there is none of that name, or there are several.
    """
    found = []
    for key in columns:
        name = key if key in names else key.split(".")[0]
        if (number := names.count(name)) != 1:
            columns_are = f"{number} columns" if number else "no column"
            raise ValueError(
                f"{path} has {columns_are} {name!r} among {str(list(names)[:8])[:200]}; check --json-keys, "
                "--text-template and --split-by."
            )
        found.append(name)
    return list(dict.fromkeys(found))


def _lines(batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    """Rows of batches. A batch with a giant row is forgotten before its rows are handed out."""
    while (batch := next(batches, None)) is not None:
        step = _some_rows(batch.num_rows, batch.nbytes)
        parts = [batch.slice(start, step) for start in range(0, batch.num_rows, step)][::-1]
        del batch
        if any(part.nbytes > GIANT_BYTES for part in parts):
            yield from _by_way_of_disk(parts)
        while parts:
            yield from _rows(parts.pop())


def _some_rows(rows: int, size: int) -> int:
    """How many of some rows are about a megabyte."""
    return min(_BATCH_ROWS, max(1, rows * _BATCH_BYTES // max(1, size)))


def _rows(batch: pa.RecordBatch) -> list[bytes]:
    values = map(_values, batch.columns)
    keys = [_key(name) for name in batch.schema.names]
    return [_object(keys, row) for row in zip(*values, strict=True)]


def _by_way_of_disk(parts: list[pa.RecordBatch]) -> Iterator[bytes]:
    """Rows of a batch, whose parts, the last one first, are forgotten before the first row is made."""
    lengths = []
    with TemporaryFile() as file:
        while parts:
            part = parts.pop()
            for row in _in_pieces(part) if part.nbytes > GIANT_BYTES else ([row] for row in _rows(part)):
                start = file.tell()
                file.writelines(row)
                lengths.append(file.tell() - start)
            del part, row
        file.seek(0)
        yield from map(file.read, lengths)


def _in_pieces(batch: pa.RecordBatch) -> Iterator[Iterator[bytes]]:
    """Rows of a batch, each in pieces."""
    keys = [_key(name) for name in batch.schema.names]

    def pieces(number: int) -> Iterator[bytes]:
        word = b"{"
        for key, column in zip(keys, batch.columns, strict=True):
            yield word + key
            yield from _value_in_pieces(column.slice(number, 1))
            word = b", "
        yield b"}"

    return map(pieces, range(batch.num_rows))


def _value_in_pieces(array: pa.Array) -> Iterator[bytes]:
    """JSON of the only value."""
    if array.null_count or not _is_text(array.type):
        yield from _values(array)
        return
    text = memoryview(array[0].as_buffer())
    yield b'"'
    for start in range(0, len(text), _PIECE_BYTES):
        yield escaped(bytes(text[start : start + _PIECE_BYTES]))
    yield b'"'


def _values(array: pa.Array) -> list[bytes]:
    """JSON of every value. Strings are never decoded here: whoever parses them checks their UTF-8."""
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage)
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        binary = array.cast(pa.large_binary() if types.is_large_string(kind) else pa.binary())
        return [b"null" if value is None else b'"%b"' % escaped(value) for value in binary.to_pylist()]
    if types.is_float32(kind) or types.is_float16(kind):  # by the digits that tell it from others of its type
        narrow = kind.to_pandas_dtype()
        shown = [None if value is None else float(str(narrow(value))) for value in array.to_pylist()]
        return [json.dumps(value).encode() for value in shown]
    if types.is_decimal(kind):
        return [b"null" if value is None else str(value).encode() for value in array.to_pylist()]
    if types.is_struct(kind):
        keys = [_key(field.name) for field in kind]
        rows = zip(*map(_values, array.flatten()), strict=True) if keys else [()] * len(array)
        return _unless_null(array, [_object(keys, row) for row in rows])
    if types.is_list(kind) or types.is_large_list(kind):
        values, lengths = iter(_values(array.flatten())), array.value_lengths().to_pylist()
        texts = [b", ".join([next(values) for _ in range(length or 0)]) for length in lengths]
        return _unless_null(array, [b"[%b]" % text for text in texts])
    return [json.dumps(value, default=_as_object).encode() for value in array.to_pylist()]


def _unless_null(array: pa.Array, values: list[bytes]) -> list[bytes]:
    if not array.null_count:
        return values
    return [
        value if valid else b"null" for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)
    ]


def _as_object(value: Any) -> dict[str, str]:
    """Bytes, dates and others that JSON lacks; no text, so no reader takes them for one."""
    return {type(value).__name__: str(value)}


def csv_rows(
    lines: Iterable[bytes | DefectError], path: str, delimiter: str, columns: Sequence[str], limit: int
) -> Iterator[bytes | DefectError]:
    """Rows of csv, whose first one names the columns, from its lines.

    Raises:
        ValueError: a column is missing, or where a row ends cannot be told.
    """
    number = 0  # of the row that is read; the header's is 0

    def texts() -> Iterator[str]:
        for line in lines:
            if isinstance(line, DefectError):
                raise ValueError(f"{path}, row {number}: {line}")
            yield line.decode("utf-8", "surrogateescape") + "\n"

    csv.field_size_limit(limit // 4)  # characters, of four bytes each
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] = []
    places: dict[bytes, int] = {}
    for number in itertools.count():
        begin = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not header and "new-line" in str(error):
                raise ValueError(
                    f"{path}: its lines end with carriage returns alone; have them end with line feeds, as "
                    r"tr '\r' '\n' does."
                ) from None
            if not header or reader.line_num > begin or "limit" in str(error):
                raise ValueError(
                    f"{path}, row {number}, from line {begin} on: no end can be told ({error}); repair its "
                    "quotes, or raise --max-document-bytes."
                ) from None
            yield DefectError("malformed csv", f"not valid csv ({error}); repair or remove the row.")
            continue
        if not header:
            header = row
            names = present(path, columns, header)
            places = {_key(name): header.index(name) for name in names}
        elif not row:
            yield b""
        elif len(row) != len(header):
            found = f"{len(row)} fields, but the header has {len(header)}"
            yield DefectError("ragged row", f"{found}; repair or remove the row.")
        elif any("\0" in row[place] for place in places.values()):
            yield DefectError("NUL", "holds a NUL byte; repair the row, or convert the file to UTF-8.")
        else:
            values = [row[place].encode("utf-8", "surrogateescape") for place in places.values()]
            yield _object(places, [b'"%b"' % escaped(value) for value in values])


def _key(name: str) -> bytes:
    return json.dumps(name).encode() + b": "


def _object(keys: Iterable[bytes], values: Iterable[bytes]) -> bytes:
    parts = [part for key, value in zip(keys, values, strict=True) for part in (b", ", key, value)]
    return b"".join([b"{", *parts[1:], b"}"])
