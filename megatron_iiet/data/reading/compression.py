"""Bytes of plain and compressed files, block after block; damage and cut ends raise, never a short read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import IO, Any, cast

from megatron_iiet.data.reading.kinds import packing_of, tells_nothing

READ_BYTES = 1 << 18
"""Read at a time."""

_PACKED_READ_BYTES = 1 << 12  # little: how far a file was read tells what its text takes on disk
_CRUMB_BYTES = 1 << 8

# How files begin that a name may hide; no text begins so.
_PACKED = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
_ENDINGS = {"gzip": ".gz", "zstd": ".zst", "xz": ".xz", "bzip2": ".bz2"}
_NO_TEXT = {
    "parquet": (rb"PAR1\x15|PARE", "give it as a file whose name ends in .parquet"),
    "Arrow": (rb"ARROW1\0\0|\xff\xff\xff\xff", "give it as a file whose name ends in .arrow"),
    "UTF-16": (rb"\xff\xfe|\xfe\xff", "convert it to UTF-8"),
    "a zip archive": (rb"PK\x03\x04", "unpack it"),
    "lz4": (rb"\x04\x22\x4d\x18", "decompress it"),
    "SQLite": (rb"SQLite format 3\0", "export its text"),
    "HDF5": (rb"\x89HDF\r\n\x1a\n", "export its text"),
}
_HEAD_BYTES = 16


def decompressed_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Content of a file in blocks of at most 256 KiB, decompressed as the ending of its ``name`` says or,
    where that tells nothing (standard input), as its first bytes do.

    Raises:
        ValueError: the compression is damaged, cut short, or followed by something else; or the content is
            no text.
    """
    packing, opened = packing_of(name), cast("IO[bytes] | _Begun", file)
    if packing is None and tells_nothing(name):
        opened = begun = _Begun(file)
        packing = next((kind for kind, magic in _PACKED.items() if magic.match(begun.head)), None)
    blocks = _content(opened, name, packing)
    head = b""
    while len(head) < _HEAD_BYTES and (block := next(blocks, b"")):
        head += block
    for kind, magic in _PACKED.items():
        if magic.match(head):
            raise ValueError(
                f"{name} holds {kind} by its first bytes; give it the ending {_ENDINGS[kind]}, or decompress "
                "it."
            )
    for kind, (beginning, remedy) in _NO_TEXT.items():
        if re.match(beginning, head):
            raise ValueError(f"{name} holds {kind} by its first bytes; {remedy}.")
    return chain([head] if head else [], blocks)


class _Begun:
    """A file whose beginning is known, to be read from there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.head = self._left = file.read(_HEAD_BYTES)

    def read(self, size: int) -> bytes:
        given, self._left = self._left[:size], self._left[size:]
        return given or self._file.read(size)


def _content(file: IO[bytes] | _Begun, name: str, packing: str | None) -> Iterator[bytes]:
    match packing:
        case None:
            return iter(partial(file.read, READ_BYTES), b"")
        case "gzip":
            return _gzip_blocks(file, name)
        case "zstd":
            import zstandard

            # Files made with --long have windows of up to 2 GiB.
            context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            return _blocks(file, name, "zstd", context.decompressobj, zstandard.ZstdError)
        case "bzip2":
            return _blocks(file, name, "bzip2", bz2.BZ2Decompressor, OSError)
        case _:
            return _blocks(file, name, "xz", _xz_stream, lzma.LZMAError, padding=b"\0")


def _xz_stream() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)  # zeros are a valid stream of the older format


def _gzip_blocks(file: Any, name: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as content:
            while block := content.read(READ_BYTES):
                yield block
    except EOFError:
        raise ValueError(f"{name} is cut short: its gzip stream has no end; fetch the file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged gzip ({error}); fetch the file again.") from None


def _blocks(
    file: IO[bytes] | _Begun,
    name: str,
    packing: str,
    frame_of: Callable[[], Any],
    damage: type[Exception],
    padding: bytes = b"",
) -> Iterator[bytes]:
    """Blocks of all frames (streams), each decompressed by an object of its own; ``padding`` may stand behind
    them.

    The libraries' file readers stop silently where a file was cut or something else follows. zstd's object
    gives everything its input holds at once, which for 50 MB of repetitive text is a few kilobytes. So that
    is fed crumbs: a block, 128 KiB decompressed, takes at least four bytes.
    """
    frame, ended = None, False
    while stored := file.read(_PACKED_READ_BYTES):
        for start in range(0, len(stored), _CRUMB_BYTES):
            crumb = stored[start : start + _CRUMB_BYTES]
            while crumb := crumb.lstrip(padding) if ended and not frame else crumb:
                frame = frame or frame_of()
                try:
                    yield from _decompressed(frame, crumb)
                except damage as error:
                    raise ValueError(
                        f"{name} is damaged {packing} ({error}); fetch the file again."
                    ) from None
                ended = bool(frame.eof)
                crumb, frame = (frame.unused_data, None) if ended else (b"", frame)
    if frame:
        raise ValueError(f"{name} is cut short: its last {packing} frame has no end; fetch the file again.")


def _decompressed(frame: Any, crumb: bytes) -> Iterator[bytes]:
    """What a crumb gives, in blocks."""
    if hasattr(frame, "needs_input"):  # the standard library's
        yield frame.decompress(crumb, READ_BYTES)
        while not (frame.eof or frame.needs_input):
            yield frame.decompress(b"", READ_BYTES)
        return
    data = frame.decompress(crumb)
    for at in range(0, len(data), READ_BYTES):
        yield data[at : at + READ_BYTES]
