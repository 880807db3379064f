"""Rows of files: every compression, every place to cut, every defect with its line, reason and message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.reading import compression, text
from megatron_iiet.data.reading.kinds import Reading
from megatron_iiet.data.reading.long_text import LongText
from megatron_iiet.data.reading.sources import list_inputs
from megatron_iiet.data.reading.text import (
    LONG_LINE_BYTES,
    Chunk,
    Reject,
    Row,
    iter_documents,
    parse_rows,
    raise_first,
    read_chunks,
)
from tests.data.inputs import GOOD, GOOD_TEXTS, INPUT_CASES, InputCase, jsonl, make_texts, zstd

PACK = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": zstd,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
}


def read(path: Path, chunk_bytes: int = 1 << 20) -> tuple[list[Row], list[Reject]]:
    """All rows and rejects of a file."""
    rows: list[Row] = []
    rejects: list[Reject] = []
    for chunk in read_chunks(path, chunk_bytes=chunk_bytes):
        good, bad = parse_rows(chunk)
        rows += good
        rejects += bad
    return rows, rejects


def parse(line: str | bytes, *keys: str, source: str | None = None) -> Row:
    data = line if isinstance(line, bytes) else line.encode()
    rows, rejects = parse_rows(Chunk("a.jsonl", 7, data), Reading(keys or ["text"], source))
    raise_first(rejects)
    (row,) = rows
    return row


@pytest.mark.parametrize("case", INPUT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 18])
def test_bad_rows_can_be_skipped(tmp_path: Path, case: InputCase, block_bytes: int) -> None:
    path = case.write(tmp_path)
    with patch.multiple(compression, READ_BYTES=block_bytes, _CRUMB_BYTES=block_bytes):
        if case.error:
            with pytest.raises(ValueError, match=case.error) as error:
                read(path, chunk_bytes=1)
            assert str(error.value).startswith(str(path))
            return
        rows, rejects = read(path, chunk_bytes=1)
    assert [row.texts for row in rows] == [(text,) for text in case.texts]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (line, reason) for line, reason, _ in case.rejects
    ]
    for reject, (line, _, message) in zip(rejects, case.rejects, strict=True):
        assert reject.message.startswith(f"{path}, line {line}: ")
        assert re.search(message, reject.message)
        assert "\n" not in reject.message
        assert len(reject.message) < len(str(path)) + 300
    bad_lines = {line for line, *_ in case.rejects}
    lines = range(1, len(rows) + len(rejects) + 1)
    assert [row.line for row in rows] == [line for line in lines if line not in bad_lines]


@pytest.mark.parametrize("case", INPUT_CASES, ids=lambda case: case.name)
def test_bad_rows_can_be_errors(tmp_path: Path, case: InputCase) -> None:
    path = case.write(tmp_path)
    if case.error or case.rejects:
        with pytest.raises(ValueError, match=case.error or case.rejects[0][2]):
            list(iter_documents([path]))
    else:
        assert list(iter_documents(list_inputs([str(path)]))) == list(case.texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACK)
def test_files_larger_than_a_chunk(tmp_path: Path, name: str) -> None:
    texts = make_texts(10_000)
    (tmp_path / name).write_bytes(PACK[name](jsonl(texts)))
    assert list(iter_documents([tmp_path / name])) == texts
    sizes = [len(chunk.data) for chunk in read_chunks(tmp_path / name, chunk_bytes=300_000)]
    assert len(sizes) > 3
    assert all(300_000 <= size < 600_000 for size in sizes[:-1])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12),
    name=st.sampled_from(list(PACK)),
    blank_lines=st.lists(st.sampled_from(["\n", " \n", "\r\n"]), max_size=3),
    blank_place=st.integers(0, 12),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    tail=st.sampled_from(["", "\n", "\n\n", "\r\n \n"]),
    chunk_bytes=st.integers(1, 300),
    block_bytes=st.integers(1, 100),
    long_line_bytes=st.sampled_from([20, 60, LONG_LINE_BYTES]),
)
def test_chunks_lose_nothing(
    tmp_path: Path,
    texts: list[str],
    name: str,
    blank_lines: list[str],
    blank_place: int,
    ascii_only: bool,
    line_end: str,
    tail: str,
    chunk_bytes: int,
    block_bytes: int,
    long_line_bytes: int,
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) + line_end for text in texts]
    place = min(blank_place, len(lines) - 1)
    content = "".join(lines[:place] + blank_lines + lines[place:]).removesuffix(line_end) + tail
    (tmp_path / name).write_bytes(PACK[name](content.encode()))
    with (
        patch.multiple(compression, READ_BYTES=block_bytes, _CRUMB_BYTES=block_bytes),
        patch("megatron_iiet.data.reading.text.LONG_LINE_BYTES", long_line_bytes),
    ):
        chunks = list(read_chunks(tmp_path / name, chunk_bytes=chunk_bytes))
        parsed = [parse_rows(chunk) for chunk in chunks]
    assert [row.texts[0] for rows, _ in parsed for row in rows] == texts
    blanks = range(place + 1, place + 1 + len(blank_lines))
    assert [(reject.line, reject.reason) for _, rejects in parsed for reject in rejects] == [
        (line, "blank line") for line in blanks
    ]
    counts = [chunk.data.count(b"\n") + 1 for chunk in chunks]
    assert [chunk.first_line for chunk in chunks] == [1 + sum(counts[:i]) for i in range(len(counts))]


def test_zstd_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)
    whole = frame + zstd(jsonl(make_texts(5)))
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        if length == len(frame):  # a file that ends with a frame is whole
            assert list(iter_documents([path])) == GOOD_TEXTS
            continue
        with pytest.raises(ValueError, match="cut short"):
            list(iter_documents([path]))


def test_gzip_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(GOOD)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut short|damaged"):
            list(iter_documents([path]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_flipped_byte_is_no_crash_and_no_wrong_text(tmp_path: Path, name: str) -> None:
    """With checksums, whatever byte changes: an error, or (in a header's idle bits) the very same texts."""
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if "zst" in name else gzip.compress
    texts = make_texts(8)
    whole = pack(jsonl(texts))
    for place in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            found = list(iter_documents([tmp_path / name]))
        except ValueError as error:
            message = str(error)
        else:
            assert found == texts
            continue
        assert re.search("damaged|cut short", message)


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
@pytest.mark.parametrize(
    "options",
    [{}, {"write_content_size": False}, {"write_checksum": True}],
    ids=["plain", "unsized", "checksum"],
)
def test_zstd_of_all_levels(tmp_path: Path, level: int, options: dict[str, bool]) -> None:
    """Blocks of all kinds: compressed, raw (random characters), of one repeated byte."""
    noise = random.Random(0).randbytes(100_000).hex()
    texts = [*make_texts(500), noise, "a" * 1_000_000, "", noise]
    compressor = zstandard.ZstdCompressor(level=level, **options)
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(jsonl(texts)))
    assert list(iter_documents([tmp_path / "a.jsonl.zst"])) == texts


def test_zstd_written_in_a_stream_with_a_large_window(tmp_path: Path) -> None:
    texts = make_texts(200)
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    with (
        (tmp_path / "a.jsonl.zst").open("wb") as file,
        zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as stream,
    ):
        for text in texts:
            stream.write(jsonl([text]))
            stream.flush()  # a block a row
    assert list(iter_documents([tmp_path / "a.jsonl.zst"])) == texts


def test_blocks_stay_small_however_well_they_are_packed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(bytes(50_000_000)))
    assert path.stat().st_size < 10_000
    with path.open("rb") as file:
        sizes = [len(block) for block in compression.decompressed_blocks(file, str(path))]
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= 1 << 18


@pytest.mark.slow
def test_a_giant_line_is_a_chunk_of_its_own(tmp_path: Path) -> None:
    giant = "é\n" * (LONG_LINE_BYTES // 8)  # eight bytes each in JSON
    texts = [*GOOD_TEXTS, giant, giant, *GOOD_TEXTS, "", giant + "end"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts)[:-1])
    chunks = list(read_chunks(tmp_path / "a.jsonl", chunk_bytes=1 << 24))  # longer than a giant line
    assert [chunk.first_line for chunk in chunks] == [1, 11, 12, 13, 24]
    assert [chunk.data.count(b"\n") for chunk in chunks] == [9, 0, 0, 10, 0]
    rows = [row for chunk in chunks for row in parse_rows(chunk)[0]]
    assert [row.line for row in rows if isinstance(row.texts[0], LongText)] == [11, 12, 24]
    assert list(iter_documents([tmp_path / "a.jsonl"])) == texts


def test_a_giant_line_in_a_small_chunk_of_a_caller() -> None:
    """What a text is given as depends on its line's length alone."""
    line = jsonl(["a" * LONG_LINE_BYTES])
    rows, _ = parse_rows(Chunk("a.jsonl", 1, GOOD + line + GOOD[:-1]))
    assert [row.line for row in rows if isinstance(row.texts[0], LongText)] == [11]


@pytest.mark.parametrize("tail", [b"", b"\n", b"\n\n"])
def test_giant_blank_lines(tmp_path: Path, tail: bytes) -> None:
    blank = b" " * (LONG_LINE_BYTES + 10)
    (tmp_path / "a.jsonl").write_bytes(GOOD + blank)
    assert list(iter_documents([tmp_path / "a.jsonl"])) == GOOD_TEXTS
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + blank + b"\n" + GOOD + tail)
    rows, rejects = read(tmp_path / "a.jsonl")
    assert [row.line for row in rows] == [*range(1, 11), *range(13, 23)]
    assert [(reject.line, reject.reason) for reject in rejects] == [(11, "blank line"), (12, "blank line")]


def test_keys() -> None:
    row = parse(
        '{"b": "B", "text": "T", "meta": {"set": "C4", "inner": {"x": "X"}}}', "text", "b", source="meta.set"
    )
    assert row == Row(7, ("T", "B"), "C4")
    assert parse('{"text": "T"}').source is None
    assert parse('{"meta": {"inner": {"x": "X"}}}', "meta.inner.x").texts == ("X",)


def test_a_key_that_is_there_with_its_dots_comes_first() -> None:
    line = '{"text": "T", "meta.set": "literal", "meta": {"set": "nested"}}'
    assert parse(line, source="meta.set").source == "literal"


@pytest.mark.parametrize(
    ("meta", "reason", "message"),
    [
        ("{}", "missing key", r"line 7: no key 'meta\.set', only \[\]; check --split-by"),
        ('{"other": 1}', "missing key", r"no key 'meta\.set', only \['other'\]"),
        ('"C4"', "missing key", r"no key 'meta\.set', only '\"C4\"'"),
        ("null", "missing key", r"no key 'meta\.set', only 'null'"),
        ('{"set": null}', "not a string", r"'meta\.set' is null, not a string"),
        ('{"set": 3}', "not a string", r"'meta\.set' is '3' \(number\), not a string"),
        ('{"set": "\\udc00"}', "lone surrogate", r"'meta\.set' holds half a surrogate pair, \\udc00"),
    ],
)
def test_bad_sources(meta: str, reason: str, message: str) -> None:
    chunk = Chunk("a.jsonl", 7, f'{{"text": "T", "meta": {meta}}}'.encode())
    rows, (reject,) = parse_rows(chunk, Reading(source_key="meta.set"))
    assert (rows, reject.reason) == ([], reason)
    assert re.search(message, reject.message)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" + "1" * 58 + "]", "a JSON list instead of an object: '[" + "1" * 58 + "]'."),
        ("[" + "1" * 59 + "]", "a JSON list instead of an object: '[" + "1" * 56 + "...'."),
        (
            '{"text": ' + "1" * 60 + "}",
            "'text' is '" + "1" * 60 + "' (number), not a string; repair or remove",
        ),
        ('{"text": ' + "1" * 61 + "}", "'text' is '" + "1" * 57 + "...' (number), not a string"),
        ("[" + "é" * 300, "(Expecting value: line 1 column 2 (char 1)): '[" + "é" * 56 + "...'; repair or"),
        ("[" + "é" * 57, "(Expecting value: line 1 column 2 (char 1)): '[" + "é" * 57 + "'; repair or"),
        (
            json.dumps({f"k{n}": 0 for n in reversed(range(10))}),
            "no key 'text', only ['k0', 'k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7']; check --json-keys.",
        ),
        (json.dumps({"k" * 300: 0}), f"no key 'text', only ['{'k' * 198}; check --json-keys."),
    ],
    ids=range(8),
)
def test_what_was_found_is_shown_in_a_bearable_length(line: str, said: str) -> None:
    """60 characters of a value, eight names or 200 characters of them."""
    _, (reject,) = parse_rows(Chunk("a.jsonl", 7, line.encode()))
    assert said in reject.message


def test_the_longest_line_that_is_not_giant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONG_LINE_BYTES", 20)
    monkeypatch.setattr(compression, "READ_BYTES", 6)
    lines = [b"a" * length for length in (3, 20, 3, 21, 3, 20)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = [
        (chunk.first_line, chunk.data.split(b"\n"))
        for chunk in read_chunks(tmp_path / "a.jsonl", chunk_bytes=1000)
    ]
    assert found == [(1, lines[:3]), (4, lines[3:4]), (5, lines[4:])]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[2:4]))
    found = [
        (chunk.first_line, chunk.data.split(b"\n"))
        for chunk in read_chunks(tmp_path / "a.jsonl", chunk_bytes=1000)
    ]
    assert found == [(1, lines[2:3]), (2, lines[3:4])]


def test_a_bad_byte_costs_its_own_line_only() -> None:
    lines = [json.dumps({"text": f"é{i}"}, ensure_ascii=False).encode() for i in range(20)]
    lines[3] = lines[3].replace("é".encode(), b"\xc3")
    lines[17] = b"\xff"
    rows, rejects = parse_rows(Chunk("a.jsonl", 1, b"\n".join(lines)))
    assert [row.texts[0] for row in rows] == [f"é{i}" for i in range(20) if i not in (3, 17)]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (4, "invalid UTF-8"),
        (18, "invalid UTF-8"),
    ]


def test_raise_first() -> None:
    raise_first([])
    with pytest.raises(ValueError, match=r"^first$"):
        raise_first([Reject(1, "blank line", "first"), Reject(2, "blank line", "second")])
