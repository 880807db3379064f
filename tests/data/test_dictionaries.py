"""Giant texts in dictionary pages of parquet files: the rows are those that pyarrow gives."""

from __future__ import annotations

import json
import random
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iiet.data.reading import dictionaries, tables

COLUMNS = ("text", "more")


@pytest.fixture(autouse=True)
def small_is_giant(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each attempt to slim a column came to."""
    monkeypatch.setattr(tables, "GIANT_BYTES", 500)
    monkeypatch.setattr(dictionaries, "_TEXT_BYTES", 100)
    monkeypatch.setattr(dictionaries, "_PIECE_BYTES", 7)
    attempts: list[bool] = []
    slim = dictionaries.Slimmed.slim

    def noting(self: dictionaries.Slimmed, chunk: Any) -> bool:
        attempts.append(slim(self, chunk))
        return attempts[-1]

    monkeypatch.setattr(dictionaries.Slimmed, "slim", noting)
    return attempts


def make_table(rows: int = 40, kind: pa.DataType | None = None) -> pa.Table:
    """Few texts, so that all are in dictionaries; half of them are giant."""
    draw = random.Random(rows)
    texts = ["".join(draw.choices('ab "\\\n\0\x1fé漢😀', k=draw.choice((0, 3, 400)))) for _ in range(8)]
    columns = {name: [draw.choice([*texts, None]) for _ in range(rows)] for name in COLUMNS}
    schema = [("number", pa.int64()), *((name, kind or pa.string()) for name in COLUMNS)]
    return pa.table({"number": list(range(rows)), **columns}, pa.schema(schema))


def stored(table: pa.Table, **how: Any) -> bytes:
    file = BytesIO()
    pq.write_table(table, file, row_group_size=25, **how)
    return file.getvalue()


def read(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(row) for row in tables.parquet_rows(BytesIO(content), "a.parquet", COLUMNS)]


@pytest.mark.parametrize("compression", ["NONE", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize(
    "how", [{}, {"data_page_version": "2.0", "write_page_checksum": True}], ids=["1", "2"]
)
def test_the_rows_are_the_same(compression: str, how: dict[str, Any], small_is_giant: list[bool]) -> None:
    table = make_table()
    assert read(stored(table, compression=compression, **how)) == table.select(COLUMNS).to_pylist()
    # Two row groups of two columns; of a codec that is not known one is tried.
    assert small_is_giant == ([False] * 2 if compression == "lz4" else [True] * 4)


def test_pages_behind_a_full_dictionary(small_is_giant: list[bool]) -> None:
    """They hold texts as they are."""
    table = make_table(200)
    content = stored(table, dictionary_pagesize_limit=1000, write_batch_size=4, data_page_size=500)
    assert "PLAIN" in pq.ParquetFile(BytesIO(content)).metadata.row_group(0).column(1).encodings
    assert read(content) == table.select(COLUMNS).to_pylist()
    assert all(small_is_giant)


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.dictionary(pa.int32(), pa.string())])
def test_other_types_are_left_to_pyarrow(kind: pa.DataType, small_is_giant: list[bool]) -> None:
    texts = make_table().column("text").combine_chunks()
    if pa.types.is_list(kind):
        texts = pa.array([[text, "b"] for text in texts.to_pylist()], kind)
    else:
        texts = texts.dictionary_encode()
    table = pa.table({"text": texts, "more": texts})
    assert read(stored(table)) == table.to_pylist()
    assert not small_is_giant


def test_small_dictionaries_stay(monkeypatch: pytest.MonkeyPatch, small_is_giant: list[bool]) -> None:
    monkeypatch.setattr(tables, "GIANT_BYTES", 1 << 20)
    table = make_table()
    assert read(stored(table)) == table.select(COLUMNS).to_pylist()
    assert not small_is_giant


def test_damage_ends_in_a_sentence_or_not_at_all() -> None:
    """Bytes of the page's header and of its first length."""
    content = stored(make_table(), compression="NONE")
    start = pq.ParquetFile(BytesIO(content)).metadata.row_group(0).column(1).dictionary_page_offset
    draw = random.Random(0)
    said = []
    for _ in range(60):
        damaged = bytearray(content)
        damaged[start + draw.randrange(24)] = draw.randrange(256)
        try:
            list(tables.parquet_rows(BytesIO(bytes(damaged)), "a.parquet", COLUMNS))
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 15
    assert {text.partition(" (")[0] for text in said} == {
        "a.parquet, row group 0: no parquet file, or damaged or cut short"
    }
