"""Files of every kind: the same documents as lines of JSON, and one outcome for each fault."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.preprocess import (
    PreprocessOptions,
    PreprocessReport,
    estimate,
    preprocess,
    run,
    tasks,
)
from megatron_iiet.data.reading import compression, kinds, tables, text
from megatron_iiet.data.reading.kinds import DEFAULT, Reading, parse_template
from megatron_iiet.data.reading.rows import escaped
from megatron_iiet.data.reading.sources import list_inputs
from megatron_iiet.data.reading.text import LONG_LINE_BYTES, Row, iter_documents, parse_rows, read_chunks
from megatron_iiet.data.reading.thrift import ColumnChunk, column_chunks
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from tests.data.inputs import BOM, make_texts, zstd
from tests.data.preprocess_runs import documents, published, run_tool

TEXTS = [*make_texts(60), 'a "quoted"\t\\ text\r\nof \x01\x7f lines', "", " ", "\n\n", "x" * 3000, "é世😀"]
ROWS = [{"id": number, "text": text, "meta": {"set": "s"}} for number, text in enumerate(TEXTS)]
TABLE = pa.Table.from_pylist(ROWS)


def lines(rows: Sequence[object] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(delimiter: str, rows: Sequence[dict[str, Any]] = ROWS) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(new: Callable[..., Any], table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def stored(kind: str) -> pa.Table:
    return TABLE.set_column(1, "text", TABLE["text"].cast(kind))


FILES = {
    "a.jsonl": lines(),
    "bom.JSONL": BOM + lines(),
    "a.ndjson.bz2": bz2.compress(lines()),
    "a.JsonL.XZ": lzma.compress(lines()),
    "padded.jsonl.xz": lzma.compress(lines()[:500]) + bytes(300) + lzma.compress(lines()[500:]) + bytes(8),
    "a.jsonl.zstd": zstd(lines()),
    "a.json": json.dumps(ROWS).encode(),
    "pretty.json.gz": gzip.compress(BOM + b"\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
    "a.csv": delimited(","),
    "a.tsv.xz": lzma.compress(BOM + delimited("\t")),
    "a.parquet": parquet(),
    "groups.pq": parquet(row_group_size=7, compression="zstd", data_page_size=100),
    "indexed.parquet": parquet(write_page_index=True, row_group_size=9),
    "large.parquet": parquet(stored("large_string"), use_dictionary=False),
    "view.parquet": parquet(stored("string_view")),
    "a.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "streams.arrow": arrow(pa.ipc.new_stream, TABLE[:9]) + arrow(pa.ipc.new_stream, TABLE[9:]),
    "dictionary.arrow": arrow(
        pa.ipc.new_file, TABLE.set_column(1, "text", TABLE["text"].dictionary_encode())
    ),
    "packed.arrow": arrow(pa.ipc.new_file, options=pa.ipc.IpcWriteOptions(compression="zstd")),
}


def rows_of(path: object, how: Reading = DEFAULT) -> tuple[list[Row], list[str]]:
    """Rows, and reasons with messages of the others."""
    found, rejects = [], []
    for chunk in read_chunks(str(path), how):
        good, bad = parse_rows(chunk, how)
        found += good
        rejects += [f"{reject.reason} | {reject.message}" for reject in bad]
    return found, rejects


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 18])
@pytest.mark.parametrize("name", FILES)
def test_all_kinds_give_the_same_documents(tmp_path: Path, name: str, block_bytes: int) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert [file.path for file in list_inputs([str(tmp_path)])] == [str(path)]
    with patch.multiple(compression, READ_BYTES=block_bytes), patch.object(tables, "_BATCH_ROWS", 5):
        found, rejects = rows_of(path)
    assert rejects == []
    assert [row.texts[0] for row in found] == TEXTS
    assert [row.line for row in found] == list(range(1, len(TEXTS) + 1))
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/kinds/{name}", FILES[name])
    assert list(iter_documents(list_inputs(["memory:///kinds"]))) == TEXTS
    memory.rm("/kinds", recursive=True)


@pytest.mark.parametrize(("giant", "closing"), [(1 << 20, 1 << 20), (60, 1 << 20), (60, 150), (1, 1)])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".pq", ".parquet", ".arrow"))])
def test_giant_rows_of_tables(tmp_path: Path, name: str, giant: int, closing: int) -> None:
    """By way of the disk, and with the reader closed before, whatever the rows around them."""
    (tmp_path / name).write_bytes(FILES[name])
    sizes = {"GIANT_BYTES": giant, "_CLOSING_BYTES": closing, "_PIECE_BYTES": 3, "_BATCH_BYTES": 200}
    with patch.multiple(tables, **sizes):
        found, rejects = rows_of(tmp_path / name)
    assert rejects == []
    assert [row.texts[0] for row in found] == TEXTS


@pytest.fixture
def shards(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, bytes], PreprocessReport]]:
    """Files that preprocessing makes, and its report; the tokenizer is loaded in this process."""
    monkeypatch.setattr(run, "in_a_process_of_its_own", lambda function, *given, **_: function(*given))

    def shards(*inputs: object, **options: Any) -> tuple[dict[str, bytes], PreprocessReport]:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        out.mkdir()
        report = preprocess(
            PreprocessOptions(
                inputs=list(map(str, inputs)),
                output_prefix=f"{out}/p",
                tokenizer_model=str(sentencepiece_model),
                progress=False,
                **options,
            ),
            log=lambda _: None,
        )
        return {
            name: digest for name, digest in published(out).items() if not name.endswith("shards")
        }, report

    return shards


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"append_eod": True}, {"deduplicate": True, "holdout_test": 0.3}])
def test_the_shards_are_the_same_bytes(
    tmp_path: Path, shards: Callable[..., Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name in ("a.jsonl", "a.json", "a.csv", "groups.pq", "stream.arrow"):
        (tmp_path / name).write_bytes(FILES[name])
        made, report = shards(tmp_path / name, chunk_bytes=500, **options)
        assert not report.failures
        results.append(made)
    for module in (text, tasks):  # what is giant is not held
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 100)
    made, report = shards(tmp_path / "groups.pq", **options)
    results.append(made)
    assert len(results[0]) >= 2
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_name_that_tells_nothing_of_a_compression(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """As those of standard input and FIFOs: the first bytes tell."""
    (tmp_path / "packed").write_bytes(pack(lines()))
    found, rejects = rows_of(tmp_path / "packed")
    assert (rejects, [row.texts[0] for row in found]) == ([], TEXTS)


@pytest.mark.parametrize(
    ("documents_are", "content", "texts"),
    [
        ("file", b'\n a\r\n\r\n"b"\n\n', ['\n a\r\n\r\n"b"\n\n']),
        ("file", BOM + b"a", ["a"]),
        ("file", b"", []),
        ("file", b"a\n" * 300_000, ["a\n" * 300_000]),
        ("blank-line", b"\n \na\n b\n\t\nc\r\nd\r\n\r\n\r\ne", ["a\n b", "c\r\nd", "e"]),
        ("blank-line", BOM + b"a\n", ["a"]),
        ("blank-line", b"\n\n", []),
    ],
)
@pytest.mark.parametrize("block_bytes", [30, 1 << 18])
def test_plain_text(
    tmp_path: Path, documents_are: Any, content: bytes, texts: list[str], block_bytes: int
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content))
    for name in ("a.txt", "a.txt.xz"):
        with patch.multiple(compression, READ_BYTES=block_bytes):
            found, rejects = rows_of(tmp_path / name, Reading(txt_documents=documents_are))
        assert ([row.texts[0] for row in found], rejects) == (texts, [])


OTHER = {"text": pa.array(["a", None]), "b": pa.array([b"x", b"y"]), "n": pa.array([1, 2])}
BAD_UTF8 = pa.array([b"ok", b"a\xffb"]).view(pa.string())
DAMAGED = bytearray(parquet(TABLE.select(["text"]), compression="none", use_dictionary=False))
DAMAGED[8:40] = b"\xff" * 32
STREAM = arrow(pa.ipc.new_stream)

FAULTS: list[tuple[str, bytes, str, str]] = [
    # A file, the key, and what is said: of the whole file, or "reason | " of rows.
    (
        "cut.parquet",
        parquet()[:-20],
        "text",
        r"cut\.parquet: no parquet file, or damaged or cut short \(.*; fetch",
    ),
    ("other.parquet", lines(), "text", r"other\.parquet: no parquet file, or damaged"),
    ("page.parquet", bytes(DAMAGED), "text", r"page\.parquet, row group 0: no parquet file, or damaged"),
    (
        "a.parquet",
        parquet(),
        "txt",
        r"a\.parquet has no column 'txt' among \['id', 'text', 'meta'\]; check --json-",
    ),
    (
        "null.parquet",
        parquet(pa.table(OTHER)),
        "text",
        r"not a string \| .*parquet, row 2: 'text' is null, not a",
    ),
    (
        "bytes.parquet",
        parquet(pa.table(OTHER)),
        "b",
        r"not a string \| .*row 1: 'b' is '{\"bytes\": .*\(object\)",
    ),
    (
        "number.parquet",
        parquet(pa.table(OTHER)),
        "n",
        r"not a string \| .*row 1: 'n' is '1' \(number\), not a string",
    ),
    (
        "utf8.parquet",
        parquet(pa.table({"text": BAD_UTF8})),
        "text",
        r"invalid UTF-8 \| .*row 2: byte b'\\xff'",
    ),
    (
        "g.jsonl",
        gzip.compress(lines()),
        "text",
        r"g\.jsonl holds gzip by its first bytes; give it the ending \.gz",
    ),
    ("z.txt", zstd(b"text"), "text", r"z\.txt holds zstd by its first bytes; .*\.zst, or decompress it"),
    ("x.csv", lzma.compress(b"text"), "text", r"x\.csv holds xz by its first bytes"),
    ("u.csv", "text\na\n".encode("utf-16"), "text", r"u\.csv holds UTF-16 by its first bytes; convert it"),
    (
        "p.jsonl",
        parquet(),
        "text",
        r"p\.jsonl holds parquet by its first bytes; give it as a file whose name",
    ),
    ("nameless", parquet(), "text", r"nameless holds parquet by its first bytes; give it as a file"),
    ("nameless", gzip.compress(parquet()), "text", r"nameless holds parquet by its first bytes; give it"),
    ("nameless", STREAM, "text", r"nameless holds Arrow by its first bytes; give it as a file whose"),
    ("nameless", arrow(pa.ipc.new_file), "text", r"nameless holds Arrow by its first bytes; give it as"),
    ("nameless", gzip.compress(lines())[:-9], "text", r"nameless is cut short: its gzip stream has no end"),
    ("twice.gz", gzip.compress(bz2.compress(lines())), "text", r"twice\.gz holds bzip2 by its first bytes"),
    ("a.txt", b"PK\3\4...", "text", r"a\.txt holds a zip archive by its first bytes; unpack it"),
    ("nul.xz", bytes(400), "text", r"nul\.xz"),
    ("cut.arrow", STREAM[:-8], "text", r"cut\.arrow is cut short: its Arrow stream has no end; fetch"),
    ("middle.arrow", STREAM[:900] + STREAM[-8:], "text", r"middle\.arrow: no arrow file, or damaged or cut"),
    (
        "cut2.arrow",
        arrow(pa.ipc.new_file)[:-8],
        "text",
        r"cut2\.arrow is cut short: its Arrow file has no end; fetch it again",
    ),
    (
        "two.arrow",
        STREAM + arrow(pa.ipc.new_stream, TABLE.select(["text"])),
        "text",
        rf"two\.arrow holds several Arrow streams, from byte {len(STREAM):,} on with other columns or types",
    ),
    ("tiny.arrow", b"abc", "text", r"tiny\.arrow is cut short"),
    ("a.arrow", STREAM, "txt", r"a\.arrow has no column 'txt' among"),
    (
        "open.json",
        b'[{"text": "a"}, {"text": "b"}',
        "text",
        r"open\.json is cut short: its JSON array has no end",
    ),
    ("string.json", b'[{"text": "a]', "text", r"string\.json is cut short: its JSON array has no end"),
    (
        "more.json",
        b'[{"text": "a"}]\n[]',
        "text",
        r"more\.json: b'\[\]' is where its JSON array ends; remove it",
    ),
    (
        "close.json",
        b'[{"text": "a"}}',
        "text",
        r"close\.json is where|close\.json: b'.*' is where|has no end",
    ),
    (
        "item.json",
        b'[{"text": "a"}, 5, {"text": "b"}]',
        "text",
        r"not an object \| .*item\.json, row 2: a JSON number",
    ),
    ("comma.json", b'[{"text": "a"},, {"text": "b"}]', "text", r"blank line \| .*comma\.json, row 2: blank"),
    ("raw.json", b'[{"text": "a\nb"}]', "text", r"invalid JSON \| .*row 1: not valid JSON \(Invalid control"),
    ("half.json", b'[{"text": "\\ud800"}]', "text", r"lone surrogate \| .*row 1: 'text' holds half"),
    ("utf8.json", b'[{"text": "\xff"}]', "text", r"invalid UTF-8 \| .*row 1: byte b'\\xff'"),
    ("object.json", b'{\n"text": "a"}', "text", r"invalid JSON \| .*object\.json, row 1"),
    (
        "head.csv",
        b"a,b\n1,2\n",
        "text",
        r"head\.csv has no column 'text' among \['a', 'b'\]; check --json-keys",
    ),
    ("twice.csv", b"text,text\n1,2\n", "text", r"twice\.csv has 2 columns 'text' among"),
    (
        "ragged.csv",
        b"text,b\n1,2\n3\n4,5,6\n",
        "text",
        r"ragged row \| .*csv, row 2: 1 fields, but the header has 2",
    ),
    ("nul.csv", b"text,b\na\0b,2\n", "text", r"NUL \| .*row 1: holds a NUL byte"),
    (
        "after.csv",
        b'text,b\n"a"b,2\nc,d\n',
        "text",
        r"malformed csv \| .*row 1: not valid csv \(.*expected after",
    ),
    (
        "quote.csv",
        b'text,b\nx,y\n"a,2\nc,d\n',
        "text",
        r"quote\.csv, row 2, from line 3 on: no end can be told",
    ),
    ("utf8.csv", b"text,b\n\xff,2\n", "text", r"invalid UTF-8 \| .*utf8\.csv, row 1: byte b'\\xff'"),
    ("mac.csv", b'text,b\r"a\rb",2\r', "text", r"mac\.csv: its lines end with carriage returns alone; have"),
    ("joined.parquet", parquet() + parquet(), "text", r"joined\.parquet holds several files, one behind"),
    (
        "indexed.parquet",
        parquet(TABLE[:3]) + parquet(TABLE, write_page_index=True, row_group_size=5),
        "text",
        "holds several files",
    ),
    (
        "joined.arrow",
        arrow(pa.ipc.new_file) + arrow(pa.ipc.new_file, TABLE[:9]),
        "text",
        "holds several files",
    ),
    ("empties.parquet", parquet(TABLE) + parquet(TABLE[:0]), "text", "holds several files"),
    ("empties.arrow", arrow(pa.ipc.new_file) + arrow(pa.ipc.new_file, TABLE[:0]), "text", "holds several"),
    ("blank.csv", b"text\na\n\nb\n", "text", r"blank line \| .*blank\.csv, row 2"),
    ("a.txt", b"a", "body", r"a\.txt has no column 'body' among \['text'\]; check --json-keys"),
    ("utf8.txt", b"a\xff", "text", r"invalid UTF-8 \| .*utf8\.txt, row 1: byte b'\\xff' is not valid UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "key", "message"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_faults(tmp_path: Path, name: str, content: bytes, key: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        _, rejects = rows_of(tmp_path / name, Reading(keys=[key]))
    except ValueError as error:
        rejects = [str(error)]
        assert " | " not in message
    assert re.search(message, rejects[0])
    assert "\n" not in rejects[0]


def test_a_footer_that_ends_pyarrow(tmp_path: Path) -> None:
    """Flipped bits at which its C++ aborts when it is asked for a column, and of a number of rows."""
    content = parquet(pa.table({"text": ["a"]}))
    for place, bit in ((-328, 2), (-327, 0), (-326, 5), (-246, 4), (-245, 6)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet.*fetch it again") as refused:
            rows_of(tmp_path / "a.parquet")
        assert "\n" not in str(refused.value)


def test_a_page_that_pyarrow_skips(tmp_path: Path) -> None:
    """It does so where it does not know the kind of a page, and reads fewer rows without a word."""
    content = bytearray(parquet(pa.table({"text": ["a", "b"]}), use_dictionary=False))
    assert content[4:6] == b"\x15\0"  # the first field of the page's header: data
    content[5] = 2 * 5
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"row group 0: .* 0 rows, but its footer tells of 2\); fetch"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".pq", ".parquet"))])
def test_column_chunks_are_as_pyarrow_reads_them(name: str) -> None:
    content = FILES[name]
    metadata = pq.read_metadata(io.BytesIO(content))
    groups = column_chunks(content[-8 - metadata.serialized_size : -8])
    assert len(groups) == metadata.num_row_groups
    for number, chunks in enumerate(groups):
        assert len(chunks) == metadata.num_columns
        for column, chunk in enumerate(chunks):
            theirs = metadata.row_group(number).column(column)
            assert chunk == ColumnChunk(
                theirs.path_in_schema,
                theirs.compression,
                theirs.num_values,
                theirs.total_compressed_size,
                theirs.total_uncompressed_size,
                theirs.data_page_offset,
                theirs.dictionary_page_offset or 0,
            )


def test_a_name_of_a_column_that_is_no_utf8(tmp_path: Path) -> None:
    for name in ("a.arrow", "a.parquet"):
        content = arrow(pa.ipc.new_stream, TABLE.select(["text"])) if name == "a.arrow" else parquet()
        (tmp_path / name).write_bytes(content.replace(b"text", b"te\xff\xff"))
        with pytest.raises(ValueError, match=rf"{name}: no (arrow|parquet) file, or damaged or cut short"):
            rows_of(tmp_path / name)


def test_a_row_group_that_lost_rows(tmp_path: Path) -> None:
    content = parquet(pa.table({"text": [*"abcdefg"]}))
    end = len(content) - 8
    footer = content[end - int.from_bytes(content[end:-4], "little") : end]
    found = []
    for place in [at for at, byte in enumerate(footer) if byte == 14]:  # 7, as Thrift writes it
        damaged = bytearray(footer)
        damaged[place] = 12
        (tmp_path / "a.parquet").write_bytes(content[: end - len(footer)] + damaged + content[end:])
        try:
            found.append([row.texts[0] for row in rows_of(tmp_path / "a.parquet")[0]])
        except ValueError as error:
            found.append(str(error).replace(str(tmp_path), ""))
    assert all(isinstance(text, str) or text == [*"abcdefg"] for text in found)
    assert any("its footer tells of 7 rows, and of 6 in row groups" in text for text in found)
    assert any("7 rows, but 6 values in a column" in text for text in found)


def test_a_checksum_of_a_page_is_compared(tmp_path: Path) -> None:
    file = io.BytesIO()
    texts = pa.table({"text": ["some text", "more text"]})
    pq.write_table(texts, file, compression="none", use_dictionary=False, write_page_checksum=True)
    (tmp_path / "a.parquet").write_bytes(file.getvalue().replace(b"\t\0\0\0some", b"\t\0\0\0same"))
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0: no parquet file, or damaged or cut"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.json", "a.txt"])
def test_a_file_of_no_bytes_has_no_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert rows_of(tmp_path / name) == ([], [])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json"])
def test_keys_that_lead_into_objects(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    how = Reading(keys=["meta.set", "text"], source_key="meta.set")
    found, rejects = rows_of(tmp_path / name, how)
    assert [(row.texts, row.source) for row in found] == [(("s", text), "s") for text in TEXTS]
    assert rejects == []
    _, rejects = rows_of(tmp_path / name, Reading(keys=["meta.other"]))
    assert re.search(r"missing key \| .*row 1: no key 'meta\.other', only \['set'\]", rejects[0])


def test_columns_of_all_types(tmp_path: Path) -> None:
    """Text in any of them is the same text, and nothing else is text."""
    table = pa.table(
        {
            "a.b": ["é", "x"],
            "struct": [{"s": "\xa0", "n": 1, "d": datetime(2020, 1, 2)}, None],
            "lists": pa.array([["a", None], None]).slice(0),
            "map": pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
            "float": [float("nan"), 1.5],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    columns = table.column_names
    (chunk,) = read_chunks(tmp_path / "a.parquet", Reading(keys=columns))
    assert list(map(json.loads, chunk.data.decode().split("\n")[1:])) == [
        {"a.b": "x", "struct": None, "lists": None, "map": [], "float": 1.5}
    ]
    first = json.loads(chunk.data.split(b"\n")[0])
    assert first.pop("float") != first
    day = {"datetime": "2020-01-02 00:00:00"}
    assert first == {
        "a.b": "é", "struct": {"s": "\xa0", "n": 1, "d": day}, "lists": ["a", None], "map": [["k", "v"]]
    }  # fmt: skip


def test_mixed_schemas(tmp_path: Path, shards: Callable[..., Any]) -> None:
    """Each file is judged by itself."""
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "b.parquet").write_bytes(parquet(pa.table({"content": ["a"]})))
    _, report = shards(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert re.search(r"b\.parquet has no column 'text' among \['content'\]", str(report.failures[0]))


@pytest.mark.parametrize("block_bytes", [100, 1 << 18])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.json", "a.txt", "b.txt", "a.parquet"])
def test_a_row_that_is_too_long_is_left_out(tmp_path: Path, name: str, block_bytes: int) -> None:
    rows = [ROWS[0], {"text": "x" * 5000}, *ROWS[1:3]]
    texts = [text.replace("\n", " ") for text in TEXTS[:3]]
    content = {
        "jsonl": lines(rows),
        "zst": zstd(lines(rows)),
        "json": json.dumps(rows).encode(),
        "txt": "\n\n".join([texts[0], "x" * 5000 + "\nend", *texts[1:]]).encode(),
        "parquet": parquet(pa.Table.from_pylist(rows)),
    }
    (tmp_path / name).write_bytes(content[name.rpartition(".")[2]])
    between: Any = "blank-line" if name == "a.txt" else "file"
    with patch.multiple(compression, READ_BYTES=block_bytes):
        found, (reject,) = rows_of(tmp_path / name, Reading(max_document_bytes=4000, txt_documents=between))
    assert [row.line for row in found] == ([] if name == "b.txt" else [1, 3, 4])
    said = r"too long \| .*(line|row) [12]: [5-9],\d{3} bytes, more than the 4,000 of --max-document-bytes"
    assert re.search(said, reject)


def test_what_is_too_long_is_not_held(tmp_path: Path) -> None:
    """Some kilobytes of a bomb are 300 MB of a line."""
    with zstandard.ZstdCompressor().stream_writer((tmp_path / "a.jsonl.zst").open("wb")) as file:
        for _ in range(300):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    _, (reject,) = rows_of(tmp_path / "a.jsonl.zst", Reading(max_document_bytes=1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "300,000,000 bytes, more than the 1,000,000" in reject
    assert peak < 10e6


def test_a_csv_field_that_is_too_long_ends_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\na\n" + b"x" * 5000 + b"\n")
    (tmp_path / "b.csv").write_bytes(b'text\na\n"' + b"xx\n" * 2000 + b'"\n')
    for name in ("a.csv", "b.csv"):
        with pytest.raises(ValueError, match=rf"{name}, row 2.*--max-document-bytes"):
            rows_of(tmp_path / name, Reading(max_document_bytes=4000))


def test_what_fits_the_memory() -> None:
    limit = kinds.fitting_document_bytes()
    assert 64 << 20 <= limit <= max(64 << 20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(
        st.fixed_dictionaries({"text": st.text(max_size=9)}, optional={'"]{\\': VALUES}), max_size=5
    ),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    block_bytes=st.integers(1, 30),
    cut=st.integers(0, 1000),
)
def test_arrays_lose_nothing(
    tmp_path: Path,
    items: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
    block_bytes: int,
    cut: int,
) -> None:
    content = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with patch.multiple(compression, READ_BYTES=block_bytes):
        found, rejects = rows_of(tmp_path / "a.json")
    assert (len(found) + len(rejects)) == len(items)
    assert [row.texts[0] for row in found] == [items[row.line - 1]["text"] for row in found]
    # and are not whole where they are cut
    (tmp_path / "a.json").write_text(content[: 1 + cut % (len(content) - 1)], errors="replace")
    with pytest.raises(ValueError, match="has no end"):
        rows_of(tmp_path / "a.json")


@given(text=st.text(), cut=st.integers(0, 50))
def test_escaped_text_is_json(text: str, cut: int) -> None:
    """In any parts."""
    data = text.encode("utf-8", "replace")
    assert json.loads(b'"%b%b"' % (escaped(data[:cut]), escaped(data[cut:]))) == data.decode()


def test_lists_of_strings(tmp_path: Path, sentencepiece_model: Path, shards: Callable[..., Any]) -> None:
    """Each is encoded by itself, and a list of one string is that text."""
    tokenizer = load_tokenizer(str(sentencepiece_model))
    lists = [["a b", "c d"], ["a b"], ["a b", ""], [], ["a bc", " d"]]
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": texts} for texts in lists]))
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"text": lists})))
    expected = [[int(id) for text in texts for id in tokenizer.encode(text)] for texts in lists]
    for name in ("a.jsonl", "a.parquet"):
        _, report = shards(tmp_path / name, append_eod=True)
        eod = tokenizer.eod_id
        prefix = sorted(tmp_path.glob("out*"))[-1] / "p_text_document"
        assert documents(prefix) == [[*ids, eod] for ids in expected if ids]
        assert report.all_units.counts.empty == 1
    _, report = shards(tmp_path / "a.jsonl", deduplicate=True)
    assert report.all_units.counts.duplicates == 1  # the third is the second


@pytest.mark.parametrize(
    ("template", "row", "outcome"),
    [
        (r"{title}\n\n{text}", {"title": "T", "text": "x"}, "T\n\nx"),
        (r"{{{meta.n}}}\t{b}\\n", {"meta": {"n": 1.5}, "b": True}, "{1.5}\ttrue\\n"),
        ("{a} is {a}.", {"a": "x"}, "x is x."),
        ("{a}, {b}", {"a": -1e999, "b": 1}, r"not a string \| .*'a' is '-Infinity' \(number\), not a string"),
        ("{a}", {"a": None}, r"not a string \| .*'a' is null"),
        ("{a}", {"b": 1}, r"missing key \| .*no key 'a', only \['b'\]; check --text-template"),
        ("{a}", {"a": {"b": 1}}, r"not a string \| .*\(object\)"),
        ("{a}", {"a": ["x"]}, r"not a string \| .*\(list\)"),
    ],
)
def test_templates(tmp_path: Path, template: str, row: dict[str, Any], outcome: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    found, rejects = rows_of(tmp_path / "a.jsonl", Reading(template=parse_template(template)))
    if " | " in outcome.replace("\\", ""):
        assert re.search(outcome, rejects[0])
    else:
        assert [row.texts for row in found] == [(outcome,)]


def test_a_damaged_length_of_a_table_is_told() -> None:
    with pytest.raises(ValueError, match=r"p: no arrow file, or damaged .*\(Negative size\)"):  # noqa: SIM117
        with tables._damage("p", "arrow"):
            raise SystemError("Negative size")


NUMBERS = ("1e400", "-0", "1.50", "12345678901234567890.10", "9" * 5000)


@pytest.mark.parametrize("longest_line", [100, LONG_LINE_BYTES])
def test_templates_take_numbers_as_the_file_has_them(tmp_path: Path, longest_line: int) -> None:
    row = ", ".join(f'"{at}": {number}' for at, number in enumerate(NUMBERS)).join("{}")
    (tmp_path / "a.jsonl").write_text(row)
    how = Reading(template=parse_template("{0} {1} {2} {3} {4}"))
    with patch("megatron_iiet.data.reading.text.LONG_LINE_BYTES", longest_line):
        ((found,), rejects) = rows_of(tmp_path / "a.jsonl", how)
    assert (found.texts, rejects) == ((" ".join(NUMBERS),), [])


def test_templates_take_the_numbers_of_columns_by_their_own_type(tmp_path: Path) -> None:
    columns = {
        "a": pa.array([0.1, 1e20, float("nan")], pa.float32()),
        "b": pa.array([0.1, 3, 0], pa.float16()),
        "c": pa.array([0.1, 1e300, 0]),
        "d": pa.array([Decimal("1.10"), Decimal("-7"), Decimal("0")], pa.decimal128(4, 2)),
        "e": pa.array([2**64 - 1, 0, 0], pa.uint64()),
    }
    pq.write_table(
        pa.table({"x": pa.StructArray.from_arrays(columns.values(), [*columns])}), tmp_path / "a.pq"
    )
    how = Reading(template=parse_template("{x.a} {x.b} {x.c} {x.d} {x.e}"))
    found, rejects = rows_of(tmp_path / "a.pq", how)
    texts = [row.texts[0] for row in found]
    assert texts == ["0.1 0.1 0.1 1.10 18446744073709551615", "1e+20 3.0 1e+300 -7.00 0"]
    assert "'x.a' is 'NaN' (number), not a string" in rejects[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("text", "names no key"),
        ("{}", r"give keys alone, as in \{title\}"),
        ("{a!r}", "give keys alone"),
        ("{a:>5}", "give keys alone"),
        ("{a", r"expected '\}'.*write \{\{ and \}\}"),
        ("a}", "Single '}'"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--text-template is .*{message}"):
        parse_template(template)


def test_templates_of_tables_and_lengths(tmp_path: Path, shards: Callable[..., Any]) -> None:
    """Shards of a template are those of the texts that it makes; filters go by them."""
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": f"{row['id']}: {row['text']}"} for row in ROWS]))
    (tmp_path / "a.parquet").write_bytes(parquet())
    limits = {"min_characters": 10, "max_characters": 300}
    plain, plain_report = shards(tmp_path / "a.jsonl", **limits)
    made, report = shards(tmp_path / "a.parquet", text_template="{id}: {text}", **limits)
    assert made == plain
    kept = sum(10 <= len(f"{row['id']}: {row['text']}") <= 300 for row in ROWS)
    assert 0 < kept == report.all_units.total.documents
    assert (
        report.all_units.counts.wrong_length == len(ROWS) - kept == plain_report.all_units.counts.wrong_length
    )
    assert f"left out: {len(ROWS) - kept} documents shorter or longer than wanted" in str(report)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fifo_is_read_once(tmp_path: Path, shards: Callable[..., Any], workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    expected, _ = shards(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(lines(),))
    writer.start()
    made, report = shards(tmp_path / "fifo", workers=workers, chunk_bytes=500)
    writer.join()
    assert (made, report.failures) == (expected, [])
    options = {"sample_tokens": 5}, {"deduplicate": True}, {"input_format": "parquet"}
    for wrong in options:
        with pytest.raises(ValueError, match=r"fifo can be read only once, but .*; or write it to a file\."):
            shards(tmp_path / "fifo", **wrong)


@pytest.mark.slow
def test_standard_input(tmp_path: Path, sentencepiece_model: Path) -> None:
    """Workers have none: what it holds is sent to them."""
    (tmp_path / "a.csv").write_bytes(FILES["a.csv"])
    arguments = ["--input", "-", tmp_path / "a.csv", "--input-format", "csv", "--workers", 2]
    arguments += ["--tokenizer-model", sentencepiece_model, "--output-dir", tmp_path / "out"]
    done = run_tool(*arguments, stdin=FILES["a.csv"].decode())
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / "out" / "text_document" / f"00000{n}.bin").read_bytes() for n in (0, 1))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "groups.pq", "stream.arrow", "a.txt"])
def test_a_corpus_is_estimated_by_the_starts_of_its_files(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = [{"id": number, "text": text} for number, text in enumerate(make_texts(3000))]
    table = pa.Table.from_pylist(rows)
    content = {
        "jsonl": lines(rows),
        "csv": delimited(",", rows),
        "json": json.dumps(rows).encode(),
        "pq": parquet(table, row_group_size=200),
        "arrow": arrow(pa.ipc.new_stream, table),
        "txt": "\n\n".join(row["text"] for row in rows).encode(),
    }
    (tmp_path / name).write_bytes(content[name.rpartition(".")[2]])
    monkeypatch.setattr(estimate, "_LOOKED_AT_BYTES", 60_000)
    monkeypatch.setattr(estimate, "_LOOKED_AT_CHUNK_BYTES", 1000)
    monkeypatch.setattr(compression, "READ_BYTES", 1000)
    options = PreprocessOptions(
        inputs=["a"], output_prefix="p", tokenizer_model="t", txt_documents="blank-line", sample_tokens=1
    )
    tokenizer = load_tokenizer(str(sentencepiece_model))
    estimated, _ = estimate.estimate(options, list_inputs([str(tmp_path / name)]), tokenizer)
    true = sum(len(tokenizer.encode(row["text"])) for row in rows)
    assert abs(estimated / true - 1) < 0.1
