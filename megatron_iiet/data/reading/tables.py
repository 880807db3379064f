"""Rows of parquet, arrow and csv files as the JSON that lines have, with the columns that are looked at."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from megatron_iiet.data.reading.rows import DefectError, escaped

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 1 << 10
_BUFFER_BYTES = 1 << 18
_MARK = b"\xff\xff\xff\xff"
_END = _MARK + bytes(4)


def parquet_rows(file: IO[bytes], path: str, columns: Sequence[str]) -> Iterator[bytes]:
    """Rows of a parquet file.

    Raises:
        ValueError: it is damaged or cut short, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # the others keep what a giant document took
    with _damage(path, "parquet"):
        table = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    names = present(path, columns, table.schema_arrow.names)
    for group in range(table.num_row_groups):
        with _damage(f"{path}, row group {group}", "parquet"):
            about = table.metadata.row_group(group)
            chunks = [about.column(number) for number in range(about.num_columns)]
            size = sum(
                chunk.total_uncompressed_size
                for chunk in chunks
                if chunk.path_in_schema.split(".")[0] in names or chunk.path_in_schema in names
            )
            rows = min(_BATCH_ROWS, max(1, about.num_rows * _BATCH_BYTES // max(1, size)))
            for columns_of_batch in map(
                _columns, table.iter_batches(rows, [group], names, use_threads=False)
            ):
                yield from _lines(columns_of_batch)


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

    head = file.read(6)
    is_stream = head != b"ARROW1"
    if is_stream:
        file.seek(max(0, file.seek(0, 2) - 8))
        # Streams of Arrow before 0.15 have no mark before each length.
        if not file.read().endswith(_END if head.startswith(_MARK) else _END[4:]):
            raise ValueError(f"{path} is cut short: its Arrow stream has no end; fetch the file again.")
    file.seek(0)
    open_it = pa.ipc.open_stream if is_stream else pa.ipc.open_file
    with _damage(path, "arrow"):
        schema = open_it(file).schema
    names = present(path, columns, schema.names)
    file.seek(0)
    with _damage(path, "arrow"):
        options = pa.ipc.IpcReadOptions(
            included_fields=sorted(map(schema.names.index, names)), use_threads=False
        )
        reader = open_it(file, options=options)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _lines(_columns(batch.slice(start, _BATCH_ROWS)))


@contextmanager
def _damage(place: str, kind: str) -> Iterator[None]:
    """Turns the library's errors into sentences; those of a disk or network stay."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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


def _columns(batch: pa.RecordBatch) -> dict[bytes, list[bytes]]:
    """JSON of a batch's values by their keys, last row first."""
    names = batch.schema.names
    return {_key(name): _values(column)[::-1] for name, column in zip(names, batch.columns, strict=True)}


def _lines(columns: dict[bytes, list[bytes]]) -> Iterator[bytes]:
    """Rows of a batch, which is forgotten by and by: it may hold a giant one."""
    for _ in range(len(next(iter(columns.values())))):
        yield _object(columns, [column.pop() for column in columns.values()])


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
