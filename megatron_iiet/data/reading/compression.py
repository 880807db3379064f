"""Bytes of plain and compressed files, block after block; damage and cut ends raise, never a short read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron_iiet.data.reading.kinds import packing_of

READ_BYTES = 1 << 18
"""Read at a time."""

_PACKED_READ_BYTES = 1 << 12  # little: how far a file was read tells what its text takes on disk
_CRUMB_BYTES = 1 << 8

# How files begin that a name may hide; no text in UTF-8 begins so.
_NO_TEXT = {
    b"\x1f\x8b": ("gzip", "give it the ending .gz, or decompress it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "give it the ending .zst, or decompress it"),
    b"\xfd7zXZ\0": ("xz", "give it the ending .xz, or decompress it"),
    b"\xff\xfe": ("UTF-16", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it to UTF-8"),
}
_HEAD_BYTES = 8


def decompressed_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Content of a file in blocks of at most 256 KiB, decompressed as the ending of its ``name`` says.

    Raises:
        ValueError: the compression is damaged, cut short, or followed by something else.
    """
    match packing_of(name):
        case None:
            return _plain_blocks(file, name)
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


def _plain_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    block = file.read(_HEAD_BYTES)
    for magic, (kind, remedy) in _NO_TEXT.items():
        if block.startswith(magic):
            raise ValueError(f"{name} holds {kind} by its first bytes; {remedy}.")
    while block:
        yield block
        block = file.read(READ_BYTES)


def _gzip_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as content:
            while block := content.read(READ_BYTES):
                yield block
    except EOFError:
        raise ValueError(f"{name} is cut short: its gzip stream has no end; fetch the file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged gzip ({error}); fetch the file again.") from None


def _blocks(
    file: IO[bytes],
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
