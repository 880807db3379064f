"""Exact duplicates: which lines repeat the text of an earlier one.

Two passes. The first writes the 128-bit digest of every document of a unit to a file in ``digests/``: 16
bytes a line, zeros for lines that do not count (defective, empty, outside the sample). When those of all
units are there, :func:`find_duplicates` compares them all, and the second pass leaves out each line that it
marked. The first of equal documents, in the order of the inputs and their lines, stays.

Memory: digests are first dealt out to up to 256 files by their leading bits, then each file is sorted by
itself, which takes about 60 bytes a document of it; besides, one bit a line. 600 million documents need
75 MB + 140 MB, and 24 bytes each of disk while it works.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.mmididx import DIGEST_BYTES, new_digest
from megatron_iiet.data.preprocess.records import Unit, exclusive, identities
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.durable import replacing

_MAGIC = b"IIETDUP2"
_HEADER = struct.Struct("<8sQ16s")
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
_PARTITION_ENTRIES = 1 << 20
_MAX_PARTITIONS = 256  # files open at once
_BLOCK_ENTRIES = 1 << 17
_DIGEST_FILE = re.compile(r"[0-9a-f]{32}\.bin")


class DigestFiles:
    """The digests of all units, by the inputs of each as they are now."""

    def __init__(self, records: Path) -> None:
        self.folder = records / "digests"

    def path(self, inputs: Sequence[InputFile]) -> Path:
        """File of a unit."""
        return self.folder / f"{inputs_digest(inputs).hex()}.bin"

    def write(
        self,
        inputs: Sequence[InputFile],
        pieces: Iterable[tuple[int, int, bytes]],
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Write a unit's file from pieces in order: number of the input, first line, digests of lines.

        The file: digests | JSON of ``left_out``, paths of inputs that could not be read and why, if there are
        any | i64 [inputs] lines of each.
        """
        self.folder.mkdir(exist_ok=True)
        lines = np.zeros(len(inputs), dtype="<i8")
        with replacing(self.path(inputs)) as file:
            for number, first_line, digests in pieces:
                file.write(bytes((first_line - 1 - int(lines[number])) * DIGEST_BYTES))  # blank lines between
                file.write(digests)
                lines[number] = first_line - 1 + len(digests) // DIGEST_BYTES
            file.write(json.dumps(dict(left_out)).encode() if left_out else b"")
            file.write(lines.tobytes())

    def has(self, inputs: Sequence[InputFile], whole: bool = True) -> bool:
        """Whether a unit's file is there, made of all of these inputs if ``whole``."""
        return self.path(inputs).exists() and not (whole and self.left_out(inputs))

    def left_out(self, inputs: Sequence[InputFile]) -> dict[str, str]:
        """Inputs of a unit that could not be read, and why."""
        with suppress(FileNotFoundError), self.path(inputs).open("rb") as file:
            file.seek(int(self.lines(inputs).sum()) * DIGEST_BYTES)
            rest = file.read()[: -8 * len(inputs)]
            return json.loads(rest) if rest else {}
        return {}

    def lines(self, inputs: Sequence[InputFile]) -> npt.NDArray[np.int64]:
        """Lines of each input of a unit, int64 [inputs]; none of those that could not be read."""
        with self.path(inputs).open("rb") as file:
            file.seek(-8 * len(inputs), 2)
            return np.frombuffer(file.read(), dtype="<i8")

    def remove_all(self, but: Iterable[Sequence[InputFile]] = ()) -> None:
        """Remove the files of all units but these."""
        kept = set(map(self.path, but))
        for path in self.folder.glob("*.bin"):
            if _DIGEST_FILE.fullmatch(path.name) and path not in kept:
                path.unlink(missing_ok=True)

    def blocks(self, inputs: Sequence[InputFile]) -> Iterator[npt.NDArray[np.uint64]]:
        """Digests of a unit's lines, uint64 [lines, 2], in blocks."""
        remaining = int(self.lines(inputs).sum())
        with self.path(inputs).open("rb") as file:
            while remaining:
                count = min(remaining, _BLOCK_ENTRIES)
                yield np.frombuffer(file.read(count * DIGEST_BYTES), dtype="<u8").reshape(count, 2)
                remaining -= count


def inputs_digest(inputs: Sequence[InputFile]) -> bytes:
    """16 bytes that tell inputs, as they are, from others."""
    content = json.dumps(identities(inputs))
    return blake2b(content.encode(), digest_size=DIGEST_BYTES).digest()


def duplicates_path(records: Path) -> Path:
    """File of the marks that :func:`find_duplicates` writes."""
    return records / "duplicates.bin"


def remove_marks(records: Path) -> None:
    """Remove that file.

    Raises:
        ValueError: it is something else.
    """
    path = duplicates_path(records)
    with suppress(FileNotFoundError):
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} was not written by this tool; move it away.")
        path.unlink()


def find_duplicates(records: Path, units: Sequence[Unit]) -> None:
    """Mark all lines that repeat an earlier one; where another job is at it, wait for that.

    The file: magic | u64 inputs | digest of the inputs | i64 [inputs + 1] first line of each | a bit a line,
    lowest first.

    Raises:
        ValueError: another job marked those of other inputs.
    """
    target = duplicates_path(records)
    inputs = [file for unit in units for file in unit.inputs]
    with exclusive(records / "duplicates.lock"):
        if Duplicates.are_of(records, inputs):
            return
        if target.exists():
            raise ValueError(
                f"{target} is of other inputs: they changed while jobs were "
                "starting; start again when none runs."
            )
        digests = DigestFiles(records)
        lines = np.concatenate([digests.lines(unit.inputs) for unit in units])
        starts = np.zeros(len(lines) + 1, dtype="<i8")
        np.cumsum(lines, out=starts[1:])
        with ExitStack() as stack:
            number = _number_of_partitions(int(starts[-1]))
            partitions = [stack.enter_context(TemporaryFile(dir=records)) for _ in range(number)]
            _deal_out(digests, units, partitions)
            marks = _mark(partitions, int(starts[-1]))
        with replacing(target) as file:
            file.write(_HEADER.pack(_MAGIC, len(lines), inputs_digest(inputs)) + starts.tobytes())
            file.write(marks.tobytes())


def _number_of_partitions(num_lines: int) -> int:
    """A power of two."""
    number = 1
    while num_lines // number > _PARTITION_ENTRIES and number < _MAX_PARTITIONS:
        number *= 2
    return number


def _deal_out(digests: DigestFiles, units: Sequence[Unit], files: Sequence[IO[bytes]]) -> None:
    """Write entries with the same leading bits to one file, in the order of the lines."""
    bits, position = len(files).bit_length() - 1, 0
    for unit in units:
        for block in digests.blocks(unit.inputs):
            entries = np.empty(len(block), dtype=_ENTRY)
            entries["high"], entries["low"] = block[:, 0], block[:, 1]
            entries["position"] = np.arange(position, position + len(block))
            position += len(block)
            entries = entries[block.any(axis=1)]
            partition = (entries["high"] >> np.uint64(64 - bits)) if bits else np.zeros(len(entries))
            order = np.argsort(partition, kind="stable")
            cuts = np.searchsorted(partition[order], np.arange(1, len(files)))
            for file, part in zip(files, np.split(entries[order], cuts), strict=True):
                file.write(part.tobytes())


def _mark(partitions: Sequence[IO[bytes]], num_lines: int) -> npt.NDArray[np.uint8]:
    """A bit a line, set where the digest occurred before: uint8 [ceil(num_lines / 8)]."""
    marks = np.zeros((num_lines + 7) // 8, dtype=np.uint8)
    for file in partitions:
        file.seek(0)
        entries = np.frombuffer(file.read(), dtype=_ENTRY)
        file.close()
        entries = entries[np.lexsort((entries["low"], entries["high"]))]  # stable: the first line comes first
        same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        repeated = entries["position"][1:][same]
        np.bitwise_or.at(marks, repeated >> 3, (1 << (repeated & 7)).astype(np.uint8))
    return marks


class Duplicates:
    """The marks, for the second pass."""

    def __init__(self, records: Path) -> None:
        path = duplicates_path(records)
        with path.open("rb") as file:
            _, num_inputs, _ = _HEADER.unpack(file.read(_HEADER.size))
            self._starts = np.frombuffer(file.read(8 * (num_inputs + 1)), dtype="<i8")
            self._first_byte = file.tell()
        self._path = path

    @staticmethod
    def are_of(records: Path, inputs: Sequence[InputFile]) -> bool:
        """Whether marks are there, of these inputs as they are now in this order."""
        with suppress(FileNotFoundError), duplicates_path(records).open("rb") as file:
            return file.read(_HEADER.size) == _HEADER.pack(_MAGIC, len(inputs), inputs_digest(inputs))
        return False

    def lines(self, index: int) -> int:
        """Lines that an input had when it was looked at; none if it could not be read."""
        return int(self._starts[index + 1] - self._starts[index])

    def digest(self, index: int, count: int) -> str:
        """Tells the marks of ``count`` inputs from ``index`` on from others of as many lines."""
        hashed = new_digest()
        for number in range(index, index + count):
            for at in range(0, self.lines(number), _BLOCK_ENTRIES):
                hashed.update(self.marks(number, at + 1, min(_BLOCK_ENTRIES, self.lines(number) - at)))
        return hashed.hexdigest()

    def marks(self, index: int, first_line: int, lines: int) -> bytes:
        """A byte a line, nonzero for duplicates: ``lines`` lines of input ``index`` from ``first_line`` on.

        Raises:
            ValueError: the input has more lines than when it was looked at.
        """
        start = int(self._starts[index]) + first_line - 1
        stop = start + lines
        if stop > self._starts[index + 1]:
            raise ValueError("the input changed between the two passes of --deduplicate; start again.")
        first, last = start // 8, -(-stop // 8)
        with self._path.open("rb") as file:
            file.seek(self._first_byte + first)
            content = np.frombuffer(file.read(last - first), dtype=np.uint8)
        bits = np.unpackbits(content, bitorder="little")[start % 8 :][:lines]
        return bits.tobytes()
