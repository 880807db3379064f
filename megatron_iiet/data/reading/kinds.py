"""What kind of file a name tells, and how its rows are to be read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Literal

import psutil

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
"""Formats by suffix."""
TABLES = frozenset({"parquet", "arrow"})
"""Formats that are read from several places of a file, and have a compression of their own."""
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""Compressions by suffix."""
ALL_KINDS = ".jsonl, .json, .csv, .tsv or .txt, also as .gz, .zst, .bz2 or .xz, .parquet or .arrow"

Template = tuple[tuple[str, str | None], ...]
"""Literal text, and the key whose value follows it."""

_MEMORY_SHARE = 16  # some workers may each hold a giant row, with its tokens, at a time
_MIN_DOCUMENT_BYTES = 64 << 20


def packing_of(path: str) -> str | None:
    """The compression that a name tells."""
    return PACKINGS.get(os.path.splitext(path)[1].lower())


def format_of(path: str) -> str | None:
    """The format that a name tells; None where it tells none that is read."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() not in PACKINGS:
        return FORMATS.get(suffix.lower())
    found = FORMATS.get(os.path.splitext(stem)[1].lower())
    return None if found in TABLES else found


def tells_nothing(path: str) -> bool:
    """Whether a name has no suffix, but for that of a compression."""
    name = os.path.basename(path)
    return "." not in (os.path.splitext(name)[0] if packing_of(name) else name)


def kind_name(path: str) -> str:
    """A file's suffixes, for people."""
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    suffixes = os.path.splitext(stem)[1] + suffix if packing_of(name) else suffix
    return suffixes.lower() or "without a suffix"


@cache
def fitting_document_bytes() -> int:
    """Bytes of the longest row that several processes can each hold in the memory there is."""
    return max(_MIN_DOCUMENT_BYTES, _memory_limit() // _MEMORY_SHARE)


def _memory_limit() -> int:
    """The machine's memory in bytes, or less where a cgroup says so."""
    limits = [psutil.virtual_memory().total]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            kind, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = Path("/sys/fs/cgroup", kind)
            for parent in (folder / place.lstrip("/"), folder):  # in a container its own is the root
                with suppress(OSError, ValueError):
                    limits.append(int((parent / name).read_text(encoding="utf-8")))
    return min(limits)


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    keys: Sequence[str] = ("text",)  # of the texts
    source_key: str | None = None  # of the name of a row's source
    template: Template = ()  # makes the only text, in place of the keys
    input_format: str | None = None  # of files whose name tells none
    txt_documents: Literal["file", "blank-line"] = "file"
    max_document_bytes: int = field(default_factory=fitting_document_bytes)  # of a line or row

    @property
    def columns(self) -> list[str]:
        """Every key that is looked at."""
        texts = [key for _, key in self.template if key is not None] if self.template else self.keys
        return list(dict.fromkeys([*texts, *([self.source_key] if self.source_key else [])]))

    def format_of(self, path: str) -> str:
        """The format to read a file as."""
        return format_of(path) or self.input_format or "jsonl"


DEFAULT = Reading()


def parse_template(text: str) -> Template:
    r"""``{title}\n\n{text}`` in its parts; ``\n``, ``\t`` and ``\\`` are understood.

    Raises:
        ValueError: it has no keys, conversions or format specifications, or unmatched braces.
    """
    text = re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"--text-template is {text!r} ({error}); write {{{{ and }}}} for braces that are text."
        ) from None
    if any(key == "" or spec or conversion for _, key, spec, conversion in parts):
        raise ValueError(f"--text-template is {text!r}; give keys alone, as in {{title}} or {{meta.title}}.")
    if not any(key for _, key, _, _ in parts):
        raise ValueError(f"--text-template is {text!r}, which names no key, as {{title}} does.")
    return tuple((literal, key) for literal, key, _, _ in parts)
