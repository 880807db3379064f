"""Reading documents: every compression, every chunk size, every bad line with its message."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.text import expand_inputs, iter_documents, parse_chunk, read_chunks
from tests.data.inputs import jsonl, make_texts

GOOD = jsonl([f"Good document {i}." for i in range(10)])


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def read(path: Path) -> list[str]:
    return list(iter_documents([path]))


SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"
ENCODINGS = {
    "a.jsonl": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "members.jsonl.gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
    "a.jsonl.zst": compress,
    "frames.jsonl.zst": lambda data: compress(data[:50]) + compress(b"") + compress(data[50:]),
    "skippable.jsonl.zst": lambda data: SKIPPABLE + compress(data) + SKIPPABLE,
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("count", [1, 3000])
def test_reads(tmp_path: Path, name: str, count: int) -> None:
    texts = make_texts(count)
    (tmp_path / name).write_bytes(ENCODINGS[name](jsonl(texts)))
    assert read(tmp_path / name) == texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12),
    chunk_bytes=st.integers(1, 200),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
    tail=st.sampled_from(["", "\n", "\n\n", "\r\n \n"]),
)
def test_chunks_lose_nothing(
    tmp_path: Path, texts: list[str], chunk_bytes: int, ascii_only: bool, line_end: str, tail: str
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes((line_end.join(lines) + tail).encode())
    chunks = list(read_chunks(path, chunk_bytes))
    assert [text for chunk in chunks for (text,) in parse_chunk(chunk, ["text"])] == texts
    counts = [chunk.data.count(b"\n") + 1 for chunk in chunks]
    assert [chunk.first_line for chunk in chunks] == [1 + sum(counts[:i]) for i in range(len(counts))]


BAD_LINES = {
    b"this is not json": r"line 11: not valid JSON \(Expecting value.*'this is not json'; repair or remove",
    b'{"text": "cut in the mid': r"line 11: not valid JSON \(Unterminated string",
    b'{"txt": "no text"}': r"line 11: no key 'text', only \['txt'\]; check --json-keys",
    b'{"text": null}': r"line 11: 'text' is null, not a string; repair or remove the line",
    b'{"text": 5}': r"line 11: 'text' is '5' \(int\), not a string",
    b'{"text": ["a b", "c d"]}': r"line 11: 'text' is .*\(list\), not a string",
    b'["text"]': r"line 11: a JSON list instead of an object",
    b'{"text": "bad \xff\xfe bytes"}': r"line 11: byte b'\\xff' is not valid UTF-8",
    b"": r"line 11: blank line between documents; remove it",
    b" \t": r"line 11: blank line between documents",
    b'{"text": "lone \\ud800 surrogate"}': r"line 11: 'text' holds half a surrogate pair, \\ud800",
    b"[" * 100_000: r"line 11: not valid JSON \(",
    b'{"text": "a"} {"text": "b"}': r"line 11: not valid JSON \(Extra data",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:20]))
@pytest.mark.parametrize("chunk_bytes", [10, 1 << 20])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, chunk_bytes: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=r"bad\.jsonl, " + BAD_LINES[line]) as error:
        [parse_chunk(chunk, ["text"]) for chunk in read_chunks(path, chunk_bytes)]
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def flip(data: bytes) -> bytes:
    return data[:30] + bytes([data[30] ^ 255]) + data[31:]


BAD_FILES = {
    "zero.jsonl": (b"", r"is empty \(0 bytes\)"),
    "zero.jsonl.zst": (b"", r"is empty \(0 bytes\)"),
    "blank.jsonl": (b"\n\n \n", "holds no documents"),
    "nothing.jsonl.gz": (gzip.compress(b""), "holds no documents"),
    "nothing.jsonl.zst": (compress(b""), "holds no documents"),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD, "line 1: starts with a byte-order mark"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1: byte b'.xff' is not valid UTF-8"),
    "cut.jsonl.zst": (compress(GOOD * 9)[:-9], "cut short: its last zstd frame has no end"),
    "header.jsonl.zst": (compress(GOOD)[:3], "cut short: its last zstd frame has no end"),
    "second.jsonl.zst": (compress(GOOD) + compress(GOOD)[:-9], "cut short: its last zstd frame has no end"),
    "flipped.jsonl.zst": (
        flip(compress(jsonl(make_texts(50)))),
        "damaged zstd|not valid UTF-8|not valid JSON",
    ),
    "other.jsonl.zst": (GOOD, "is damaged zstd"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-9], "cut short: its gzip stream has no end"),
    "flipped.jsonl.gz": (flip(gzip.compress(GOOD)), "is damaged gzip"),
    "other.jsonl.gz": (GOOD, "is damaged gzip"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)


def test_zstd_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = compress(GOOD) + compress(jsonl(make_texts(20)))
    frame = len(compress(GOOD))
    for length in range(1, len(whole)):
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:length])
        if length == frame:  # a file that ends with a frame is whole
            assert len(read(tmp_path / "a.jsonl.zst")) == 10
            continue
        with pytest.raises(ValueError, match="cut short"):
            read(tmp_path / "a.jsonl.zst")


def test_expand_inputs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.zst", "c[1].jsonl", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    folder = str(tmp_path)
    found = expand_inputs([f"{folder}/c[1].jsonl", f"{folder}/[ab]*.jsonl*"])
    assert [Path(path).name for path in found] == ["c[1].jsonl", "a.jsonl.zst", "b.jsonl"]
    for patterns, message in [
        (["*.gz"], r"pattern .*\*\.gz matches no file"),
        (["no.jsonl"], r"no\.jsonl is missing"),
        ([""], "is a folder; give its files"),
        (["notes.txt"], r"notes\.txt is of an unknown kind"),
        (["b.jsonl", "*.jsonl"], r"b\.jsonl is named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_inputs([f"{folder}/{pattern}" for pattern in patterns])
