"""Bytes of plain, gzip and zstd files, block after block; damage and cut ends raise, never a short read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import IO

READ_BYTES = 1 << 18
"""Read at a time."""

_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = 0x184D2A50  # of 16 magic numbers, up to ...5F
_RLE_BLOCK = 1


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
    everything its input holds at once, which for 50 MB of repetitive text is a few kilobytes. So the frames
    are walked here (RFC 8878) and handed over block by block: each is at most 128 KiB decompressed.
    """
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with --long
    reader = _ExactReader(file, name)
    try:
        while magic := reader.read_or_end(4):
            number = int.from_bytes(magic, "little")
            if number & ~0xF == _SKIPPABLE_MAGIC:
                reader.skip(int.from_bytes(reader.read(4), "little"))
                continue
            if number != _ZSTD_MAGIC:
                raise ValueError(
                    f"{name} is damaged zstd ({magic!r} is not the start of a frame); fetch the file again."
                )
            frame = context.decompressobj()
            for piece in _frame_pieces(magic, reader):
                if data := frame.decompress(piece):
                    yield data
            assert frame.eof, name  # the library saw the end where the walk did
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is damaged zstd ({error}); fetch the file again.") from None


def _frame_pieces(magic: bytes, reader: _ExactReader) -> Iterator[bytes]:
    """A frame's header, then each of its blocks, then its checksum if it has one."""
    descriptor = reader.read(1)
    flags = descriptor[0]
    single_segment = flags >> 5 & 1
    window_bytes = 1 - single_segment
    dictionary_bytes = (0, 1, 2, 4)[flags & 3]
    size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    yield magic + descriptor + reader.read(window_bytes + dictionary_bytes + size_bytes)
    last = 0
    while not last:
        header = reader.read(3)
        number = int.from_bytes(header, "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        yield header + reader.read(1 if kind == _RLE_BLOCK else size)
    if flags & 4:
        yield reader.read(4)


class _ExactReader:
    """Reads all the bytes asked for or raises."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ValueError(
                f"{self._name} is cut short: its last zstd frame has no end; fetch the file again."
            )
        return data

    def read_or_end(self, size: int) -> bytes:
        """``size`` bytes, or none at the end of the file."""
        first = self._file.read(1)
        return first and first + self.read(size - 1)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.read(min(size, READ_BYTES)))
