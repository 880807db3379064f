"""Text of the data tests, made from a list of syllables, with the defects that files have; shards by hand."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from megatron_iiet.data.corpora.mmididx import MAGIC, bin_path, idx_path

_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxz" for v in "aeiou"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of made-up words, some with line breaks, digits and characters outside ASCII."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(500)]
    texts = []
    for _ in range(count):
        lines = [
            " ".join(chance.choices(words, k=chance.randint(3, 20))) for _ in range(chance.randint(1, 5))
        ]
        texts.append(f"{chance.randint(0, 999)} é世 " + "\n".join(lines))
    return texts


def jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 4) + b"skip"

GOOD_TEXTS = [f"Good document {i}." for i in range(10)]
GOOD = jsonl(GOOD_TEXTS)
BOM = b"\xef\xbb\xbf"
_PARTS = (GOOD[:50], GOOD[50:])


@dataclass(frozen=True)
class InputCase:
    """A file and what has to come of it."""

    name: str
    content: bytes
    texts: Sequence[str] = ()
    """Of the proper rows, as they are read where defective ones are skipped."""
    rejects: Sequence[tuple[int, str, str]] = ()
    """Line, reason, and a regular expression for the message, of each defective row."""
    error: str | None = None
    """Regular expression for the error that the whole file gives, whatever is done with defective rows."""

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.content)
        return path


def _line(name: str, line: bytes, reason: str, message: str) -> InputCase:
    """A defective line between good ones."""
    content = GOOD + line + b"\n" + GOOD
    return InputCase(name, content, GOOD_TEXTS * 2, [(11, reason, message)])


def _proper_line(name: str, line: bytes, text: str) -> InputCase:
    return InputCase(name, GOOD + line + b"\n" + GOOD, [*GOOD_TEXTS, text, *GOOD_TEXTS])


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


_GZIP = gzip.compress(GOOD, mtime=0)
_ZSTD = zstd(GOOD)
_LONG_ZSTD = zstd(jsonl(make_texts(50)))
_UTF16 = '{"text": "a"}\n{"text": "b"}'.encode("utf-16")

INPUT_CASES = [
    # Proper files
    InputCase("plain.jsonl", GOOD, GOOD_TEXTS),
    InputCase("plain.json", GOOD, GOOD_TEXTS),
    InputCase("plain.ndjson", GOOD, GOOD_TEXTS),
    InputCase("no_line_end.jsonl", GOOD[:-1], GOOD_TEXTS),
    InputCase("blank_end.jsonl", GOOD + b"\n \n\r\n", GOOD_TEXTS),
    InputCase("crlf.jsonl", GOOD.replace(b"\n", b"\r\n"), GOOD_TEXTS),
    InputCase("plain.jsonl.gz", _GZIP, GOOD_TEXTS),
    InputCase("members.jsonl.gz", b"".join(map(gzip.compress, _PARTS)), GOOD_TEXTS),
    InputCase("padded.jsonl.gz", _GZIP + bytes(512), GOOD_TEXTS),
    InputCase("empty_member.jsonl.gz", gzip.compress(b"") + _GZIP, GOOD_TEXTS),
    InputCase("plain.jsonl.zst", _ZSTD, GOOD_TEXTS),
    InputCase("plain.jsonl.bz2", bz2.compress(GOOD), GOOD_TEXTS),
    InputCase("streams.JSONL.BZ2", b"".join(map(bz2.compress, _PARTS)), GOOD_TEXTS),
    InputCase("streams.jsonl.Xz", b"".join(map(lzma.compress, _PARTS)), GOOD_TEXTS),
    InputCase("frames.jsonl.zst", b"".join(map(zstd, _PARTS)), GOOD_TEXTS),
    InputCase("empty_frame.jsonl.zst", zstd(_PARTS[0]) + zstd(b"") + zstd(_PARTS[1]), GOOD_TEXTS),
    InputCase("skippable.jsonl.zst", SKIPPABLE_FRAME + _ZSTD + SKIPPABLE_FRAME, GOOD_TEXTS),
    InputCase("bom.jsonl", BOM + GOOD, GOOD_TEXTS),
    InputCase("zero.jsonl", b""),
    InputCase("zero.jsonl.gz", b""),
    InputCase("zero.jsonl.zst", b""),
    InputCase("blanks.jsonl", b"\n\n \n"),
    InputCase("nothing.jsonl.gz", gzip.compress(b"")),
    InputCase("nothing.jsonl.zst", zstd(b"")),
    InputCase("only_skippable.jsonl.zst", SKIPPABLE_FRAME),
    InputCase("all_empty.jsonl", jsonl([""] * 3), [""] * 3),
    _proper_line("empty_text.jsonl", b'{"text": ""}', ""),
    _proper_line("control.jsonl", b'{"text": "a\\u0000b </s> <s>"}', "a\0b </s> <s>"),
    _proper_line("separators.jsonl", '{"text": "a\u2028b\u0085c"}'.encode(), "a\u2028b\u0085c"),
    _proper_line("pair.jsonl", b'{"text": "\\ud83d\\ude00"}', "😀"),
    _proper_line("twice.jsonl", b'{"other": 1, "text": "b", "other": {"a": [], "a": 2}}', "b"),
    _proper_line("digits.jsonl", b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "a"),
    _proper_line("nan.jsonl", b'{"score": NaN, "limit": -Infinity, "text": "a"}', "a"),
    _proper_line("spaces.jsonl", b' \t{ "text" :\r"a" } ', "a"),
    _proper_line("other_half.jsonl", b'{"meta": "\\ud800", "text": "a"}', "a"),
    # Defective lines
    _line("no_json.jsonl", b"this is not json", "invalid JSON", "not valid JSON.*'this is not json'; repair"),
    _line("cut_line.jsonl", b'{"text": "cut in the mid', "invalid JSON", r"not valid JSON \(Unterminated"),
    _line(
        "two_objects.jsonl", b'{"text": "a"} {"text": "b"}', "invalid JSON", r"not valid JSON \(Extra data"
    ),
    _line(
        "nested.jsonl",
        b'{"text": "a", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        "nested too deeply",
        r"about 1,000 deep in one another, which is not read whatever else it holds: '\{\"text.*; flatten",
    ),
    _line("same_key.jsonl", b'{"text": "a", "text": "a"}', "repeated key", "'text' is there more than once"),
    _line("raw_control.jsonl", b'{"text": "a\x01b"}', "invalid JSON", r"not valid JSON \(Invalid control"),
    _line("escape.jsonl", b'{"text": "a\\x41"}', "invalid JSON", r"not valid JSON \(Invalid \\escape"),
    _line("zeros.jsonl", bytes(9), "invalid JSON", r"not valid JSON \("),
    _line("list.jsonl", b'["text"]', "not an object", "a JSON list instead of an object"),
    _line("null_line.jsonl", b"null", "not an object", "a JSON null instead of an object"),
    _line("no_key.jsonl", b'{"txt": "no text"}', "missing key", r"no key 'text', only \['txt'\]; check"),
    _line("null.jsonl", b'{"text": null}', "not a string", "'text' is null, not a string; repair or remove"),
    _line("int.jsonl", b'{"text": 5}', "not a string", r"'text' is '5' \(number\), not a string"),
    _line("nan_text.jsonl", b'{"text": NaN}', "not a string", r"'text' is 'NaN' \(number\), not a string"),
    _line(
        "list_of.jsonl", b'{"text": ["a", 5]}', "not a string", r"'text\[1\]' is '5' \(number\), not a string"
    ),
    _line(
        "utf8.jsonl", b'{"text": "bad \xff\xfe bytes"}', "invalid UTF-8", r"byte b'\\xff' is not valid UTF-8"
    ),
    _line("cut_utf8.jsonl", b'{"text": "\xe4\xb8"}', "invalid UTF-8", r"byte b'\\xe4' is not valid UTF-8"),
    _line("cesu.jsonl", b'{"text": "\xed\xa0\xbd"}', "invalid UTF-8", r"byte b'\\xed' is not valid UTF-8"),
    _line("blank.jsonl", b"", "blank line", "blank line between documents; remove it"),
    _line("spaces_only.jsonl", b" \t\r", "blank line", "blank line between documents; remove it"),
    _line(
        "half.jsonl", b'{"text": "\\ud800"}', "lone surrogate", r"'text' holds half a surrogate pair, \\ud800"
    ),
    _line(
        "swapped.jsonl", b'{"text": "\\ude00\\ud83d"}', "lone surrogate", r"half a surrogate pair, \\ude00"
    ),
    _line("inner_bom.jsonl", BOM + b'{"text": "a"}', "byte-order mark", "starts with a byte-order mark"),
    InputCase(
        "blank_start.jsonl",
        b"\n\n" + GOOD,
        GOOD_TEXTS,
        [(1, "blank line", "line 1: blank line"), (2, "blank line", "line 2: blank line")],
    ),
    InputCase(
        "cut_end.jsonl", GOOD + b'{"text":"cut', GOOD_TEXTS, [(11, "invalid JSON", "Unterminated string")]
    ),
    # Damaged files
    InputCase("utf16.jsonl", _UTF16, error="holds UTF-16 by its first bytes; convert it to UTF-8"),
    InputCase("cut.jsonl.gz", _GZIP[:-9], error="cut short: its gzip stream has no end; fetch"),
    InputCase("cut_member.jsonl.gz", _GZIP + _GZIP[:30], error="cut short: its gzip stream has no end"),
    InputCase("flipped.jsonl.gz", _flip(_GZIP, 30), error="is damaged gzip"),
    InputCase("checksum.jsonl.gz", _flip(_GZIP, len(_GZIP) - 6), error="is damaged gzip"),
    InputCase("other.jsonl.gz", GOOD, error="is damaged gzip"),
    InputCase("rubbish.jsonl.gz", _GZIP + b"rubbish", error="is damaged gzip"),
    InputCase("cut.jsonl.zst", _ZSTD[:-9], error="cut short: its last zstd frame has no end; fetch"),
    InputCase("header.jsonl.zst", _ZSTD[:3], error="cut short: its last zstd frame has no end"),
    InputCase("cut_frame.jsonl.zst", _ZSTD + _ZSTD[:-9], error="cut short: its last zstd frame has no end"),
    InputCase("cut_skippable.jsonl.zst", _ZSTD + SKIPPABLE_FRAME[:-1], error="cut short"),
    InputCase("flipped.jsonl.zst", _flip(_LONG_ZSTD, len(_LONG_ZSTD) // 2), error="damaged zstd"),
    InputCase("flipped_header.jsonl.zst", _flip(_ZSTD, 4), error="damaged zstd|cut short"),
    InputCase("other.jsonl.zst", GOOD, error="is damaged zstd"),
    InputCase("rubbish.jsonl.zst", _ZSTD + b"rubbish", error="damaged zstd .*Unknown frame"),
    *(
        InputCase(f"{what}.jsonl{suffix}", content, error=f"{said} {packing}|{packing} frame has no end")
        for suffix, packing, whole in (
            (".bz2", "bzip2", bz2.compress(GOOD)),
            (".xz", "xz", lzma.compress(GOOD)),
        )
        for what, content, said in (
            ("cut", whole[:-5], "cut short: its last"),
            ("flipped", _flip(whole, len(whole) // 2), "is damaged"),
            ("rubbish", whole + b"rubbish and more of it", "is damaged"),
            ("other", GOOD, "is damaged"),
        )
    ),
    InputCase("zeros.jsonl.zst", _ZSTD + bytes(512), error="is damaged zstd"),
]
"""Files of all kinds of content; none may crash a tool or lose a row that is proper."""


def write_pair(
    prefix: Path, lengths: list[int], documents: list[int], offsets: list[int] | None = None, code: int = 8
) -> Path:
    """A pair by hand: lengths of the sequences, first sequence of each document and the end; token i is i."""
    itemsize = {4: 4, 8: 2}[code]
    offsets = [0, *(np.cumsum(lengths)[:-1] * itemsize).tolist()] if offsets is None else offsets
    index = struct.pack("<9sQBQQ", MAGIC, 1, code, len(lengths), len(documents))
    index += np.array(lengths, dtype="<i4").tobytes() + np.array(offsets, dtype="<i8").tobytes()
    idx_path(prefix).write_bytes(index + np.array(documents, dtype="<i8").tobytes())
    bin_path(prefix).write_bytes(np.arange(sum(lengths), dtype=f"<i{itemsize}").tobytes())
    return prefix


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
