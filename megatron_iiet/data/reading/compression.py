"""Bytes of plain, gzip and zstd files, block after block; damage and cut ends raise, never a short read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import IO

READ_BYTES = 1 << 18
"""Read at a time."""

_ZSTD_READ_BYTES = 1 << 12  # little: how far a file was read tells what its text takes on disk
_CRUMB_BYTES = 1 << 8


def decompressed_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Content of a file in blocks of at most 256 KiB, decompressed as the ending of its ``name`` says.

    Raises:
        ValueError: the compression is damaged, cut short, or followed by something else.
    """
    if name.endswith(".zst"):
        return _zstd_blocks(file, name)
    if name.endswith(".gz"):
        return _gzip_blocks(file, name)
    return iter(lambda: file.read(READ_BYTES), b"")


def _gzip_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as content:
            while block := content.read(READ_BYTES):
                yield block
    except EOFError:
        raise ValueError(f"{name} is cut short: its gzip stream has no end; fetch the file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is damaged gzip ({error}); fetch the file again.") from None


def _zstd_blocks(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Blocks of all frames.

    The library's stream reader stops silently where a file was cut, and its decompression object gives
    everything its input holds at once, which for 50 MB of repetitive text is a few kilobytes. So that is fed
    crumbs: a block, 128 KiB decompressed, takes at least four bytes.
    """
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with --long
    frame = None
    try:
        while stored := file.read(_ZSTD_READ_BYTES):
            for start in range(0, len(stored), _CRUMB_BYTES):
                crumb = stored[start : start + _CRUMB_BYTES]
                while crumb:
                    frame = frame or context.decompressobj()
                    data = frame.decompress(crumb)
                    for at in range(0, len(data), READ_BYTES):
                        yield data[at : at + READ_BYTES]
                    crumb, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is damaged zstd ({error}); fetch the file again.") from None
    if frame:
        raise ValueError(f"{name} is cut short: its last zstd frame has no end; fetch the file again.")
