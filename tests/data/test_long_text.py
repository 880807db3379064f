"""Texts of giant lines, against decoding the whole line at once."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.reading.kinds import Reading
from megatron_iiet.data.reading.long_text import LongText, parse_long_line, parts_of, strings_of
from megatron_iiet.data.reading.text import LONG_LINE_BYTES, Chunk, parse_rows

HALVES = st.sampled_from([chr(code) for code in (0xD800, 0xDBFF, 0xDC00, 0xDFFF)])
PROPER = st.text(
    st.sampled_from('a1é世😀\n\\"u/\0\x1f\x7f\ud7ff\ue000') | st.characters(exclude_categories=["Cs"])
)


def literal(text: str, ascii_only: bool) -> bytes:
    return json.dumps(text, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def scan(raw: bytes, piece_bytes: int) -> LongText:
    """A literal with its quotes, in a line with something before and after it."""
    return LongText.scan(b"[" + raw + b', "\\', 2, len(raw), piece_bytes)


@settings(max_examples=400)
@given(text=PROPER, ascii_only=st.booleans(), piece_bytes=st.integers(16, 60))
@example(text="😀" * 30, ascii_only=True, piece_bytes=17)
@example(text="\\" * 50, ascii_only=False, piece_bytes=16)
@example(text="\\u0041" * 20, ascii_only=False, piece_bytes=16)
@example(text="a\n" * 50, ascii_only=False, piece_bytes=16)
def test_parts_are_those_of_the_whole_text(text: str, ascii_only: bool, piece_bytes: int) -> None:
    long_text = scan(literal(text, ascii_only), piece_bytes)
    parts = list(long_text.parts(piece_bytes))
    assert "".join(parts) == text
    assert all(0 < len(part) <= piece_bytes for part in parts)
    assert long_text.characters == len(text)
    assert long_text.utf8_bytes == len(text.encode())
    assert long_text.lone_surrogate is None


@pytest.mark.parametrize(
    "unit", ["\\ud83d\\ude00", "\\\\", "\\u0041", "\\n", "é世😀", '\\"', "\\\\ud83d\\\\ude00"]
)
@pytest.mark.parametrize("piece_bytes", range(16, 33))
def test_every_place_of_a_cut(unit: str, piece_bytes: int) -> None:
    for offset in range(13):
        raw = f'"{"x" * offset}{unit * 20}"'.encode()
        text = json.loads(raw)
        assert "".join(scan(raw, piece_bytes).parts(piece_bytes)) == text


@pytest.mark.slow
@settings(max_examples=400)
@given(pieces=st.lists(PROPER | HALVES, max_size=60), piece_bytes=st.integers(16, 40))
@example(pieces=["\ud800"] * 50, piece_bytes=16)
@example(pieces=["\ud83d"] * 20 + ["\ude00"], piece_bytes=18)
def test_lone_surrogates_are_found(pieces: list[str], piece_bytes: int) -> None:
    raw = literal("".join(pieces), ascii_only=True)
    text = json.loads(raw)  # halves that met have become one character
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    assert scan(raw, piece_bytes).lone_surrogate == (halves[0] if halves else None)


@settings(max_examples=400)
@given(
    before=st.integers(0, 40),
    defect=st.sampled_from(
        [
            b"\\x",
            b"\\u12g4",
            b"\\u12",
            b"\n",
            b"\0",
            b"\x1f",
            b"\xff",
            b"\xc3",
            b"\xed\xa0\x80",
            b"\xc0\x80",
            b"\x80" * 30,
        ]
    ),
    after=st.integers(0, 40),
    piece_bytes=st.integers(16, 40),
)
def test_defects_are_found_wherever_they_are(
    before: int, defect: bytes, after: int, piece_bytes: int
) -> None:
    raw = b'"' + b"a" * before + defect + b"z" * after + b'"'
    with pytest.raises(ValueError) as expected:  # what the whole gives
        json.loads(raw.decode())
    with pytest.raises(ValueError) as error:
        scan(raw, piece_bytes)
    assert isinstance(error.value, UnicodeDecodeError) == isinstance(expected.value, UnicodeDecodeError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(value=JSON, ascii_only=st.booleans(), min_bytes=st.integers(1, 20))
def test_lines_are_read_as_json_reads_them(value: object, ascii_only: bool, min_bytes: int) -> None:
    line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(line.decode(), parse_int=str)
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            parse_long_line(line, min_bytes)
        return
    found = parse_long_line(line, min_bytes)

    def is_same(found: object, expected: object) -> bool:
        if isinstance(found, dict) and isinstance(expected, dict):
            pairs = zip(found.items(), expected.items(), strict=True)
            return all(is_same(a, b) and (k == q or len(k) > 32) for (k, a), (q, b) in pairs)
        if isinstance(found, list) and isinstance(expected, list):
            return all(is_same(a, b) or len(str(a)) > 32 for a, b in zip(found, expected, strict=True))
        if isinstance(found, LongText):
            return "".join(found.parts()) == expected
        return found == expected

    assert is_same({"": found}, {"": expected}) or (isinstance(expected, str) and len(found) > 32)


def test_giant_items_of_a_list_are_texts() -> None:
    line = json.dumps({"text": ["short", GIANT]}).encode()
    ((row,), rejects) = parse_rows(Chunk("a.jsonl", 3, line))
    assert rejects == []
    assert ["".join(parts_of(text)) for text in strings_of(row.texts[0])] == ["short", GIANT]


def test_values_of_objects_are_put_back_at_any_depth() -> None:
    value = parse_long_line(b'{"a": {"b": "long"}, "c": [{"d": "long"}], "e": "no"}', min_bytes=4)
    assert ["".join(text.parts()) for text in (value["a"]["b"], value["c"][0]["d"])] == ["long", "long"]
    assert value["e"] == "no"
    assert len(repr(value)) < 500  # shows no text


GIANT = "x" * LONG_LINE_BYTES


def reject_of(line: bytes) -> tuple[str, str]:
    rows, (reject,) = parse_rows(Chunk("a.jsonl", 3, line), Reading(source_key="set"))
    assert rows == []
    assert reject.message.startswith("a.jsonl, line 3: ")
    assert len(reject.message) < 300
    return reject.reason, reject.message


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (f'{{"set": "C4", "text": "{GIANT}', "invalid JSON", "unterminated string that begins at byte 23"),
        ('{"' + '\\"' * LONG_LINE_BYTES, "invalid JSON", "unterminated string that begins at byte 2"),
        (f'{{"set": "C4", "text": "{GIANT}"', "invalid JSON", "Expecting ',' delimiter"),
        (f'{{"set": "C4", "text": "{GIANT}\\x"}}', "invalid JSON", r"Invalid \\escape near byte 8,388,63\d"),
        (
            f'{{"set": "C4", "text": "{GIANT}\n\t"}}',
            "invalid JSON",
            "Invalid control character near byte 8,388",
        ),
        (f'{{"set": "C4", "other": "{GIANT}\\x", "text": ""}}', "invalid JSON", "Invalid"),
        (f'{{"set": "C4", "text": "{GIANT}\\ud83d"}}', "lone surrogate", r"'text' holds half.*\\ud83d"),
        (f'{{"set": "C4", "txt": "{GIANT}"}}', "missing key", r"only \['set', 'txt'\]"),
        (f'{{"set": "C4", "text": [["{GIANT}"]]}}', "not a string", r"'text\[0\]' is .*\(list\)"),
        (f'{{"text": "", "set": "{GIANT}"}}', "not a string", "'set' holds 8,388,608 characters, not a name"),
        (f'["{GIANT}"]', "not an object", "a JSON list instead of an object"),
        (f'"{GIANT}"', "not an object", "a JSON string instead of an object"),
        (f'\ufeff{{"text": "{GIANT}", "set": "C4"}}', "byte-order mark", "save it as UTF-8 without BOM"),
        ("[" * LONG_LINE_BYTES + "[", "nested too deeply", "about 1,000 deep"),
    ],
)
def test_defects_of_giant_lines(line: str, reason: str, message: str) -> None:
    assert len(line) > LONG_LINE_BYTES
    found_reason, found_message = reject_of(line.encode().replace(b"\n\t", b"\t"))
    assert found_reason == reason
    assert re.search(message, found_message)


@pytest.mark.parametrize("place", [0, LONG_LINE_BYTES // 2, LONG_LINE_BYTES + 22])
def test_bad_bytes_of_giant_lines(place: int) -> None:
    line = f'{{"set": "C4", "text": "{GIANT}"}}'.encode()
    reason, message = reject_of(line[:place] + b"\xfe" + line[place:])
    assert reason == "invalid UTF-8"
    assert "byte b'\\xfe' is not valid UTF-8" in message


def test_giant_lines_give_rows() -> None:
    other_half = json.dumps("\ud800" + GIANT)  # where nobody looks
    line = (
        f'{{"short": "s", "text": "{GIANT}\\n世", "meta": {{"set": "C4"}}, "other": {other_half}}}'.encode()
    )
    (row,), rejects = parse_rows(Chunk("a.jsonl", 3, line), Reading(["text", "short"], "meta.set"))
    text, short = row.texts
    assert isinstance(text, LongText)
    assert "".join(text.parts()) == GIANT + "\n世"
    assert (text.characters, text.utf8_bytes) == (LONG_LINE_BYTES + 2, LONG_LINE_BYTES + 4)
    assert (short, row.source, row.line, rejects) == ("s", "C4", 3, [])


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["word\n", "é世 ", "😀", "\\", '"', "\0"])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_giant_text_is_never_decoded_whole(unit: str, ascii_only: bool) -> None:
    bytes_a_unit = len(literal(unit, ascii_only)) - 2
    text = unit * (2 * LONG_LINE_BYTES // bytes_a_unit)
    line = b'{"text": ' + literal(text, ascii_only) + b"}"
    length = len(text)
    del text
    chunk = Chunk("a.jsonl", 1, line)
    tracemalloc.start()
    try:
        (row,), _ = parse_rows(chunk)
        assert isinstance(row.texts[0], LongText)
        assert sum(map(len, row.texts[0].parts())) == length
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # parts of a quarter of a megabyte, in several forms
