"""Safetensors files a part at a time: the library's own writer wants all tensors in memory, its reader maps
files, whose pages then count as this process's."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_iiet.durable import replacing
from megatron_iiet.storage.integrity import BlockDigests, Blocks, DamagedError

CHUNK_BYTES = 16 << 20
"""About as much fp32 as is made or converted at a time."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What is written and read, by the format's names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is made when its turn comes."""

    shape: Shape
    dtype: torch.dtype
    """As which it is stored."""
    parts: Callable[[], Iterable[Tensor]]
    """Makes its rows in order, any number at a time; a scalar is one part."""

    @classmethod
    def whole(cls, shape: Shape, make: Callable[[], Tensor]) -> TensorToWrite:
        """One stored as fp32 that ``make`` makes at once."""

        def parts() -> Iterator[Tensor]:
            yield make()

        return cls(shape, torch.float32, parts)

    @classmethod
    def of_rows(cls, shape: Shape, dtype: torch.dtype, rows: Callable[[int, int], Tensor]) -> TensorToWrite:
        """One of which ``rows`` makes the rows [first, last), fp32, asked for a chunk at a time."""
        most = max(1, CHUNK_BYTES // (4 * prod(shape[1:])))

        def parts() -> Iterator[Tensor]:
            for first in range(0, shape[0], most):
                yield rows(first, min(first + most, shape[0]))

        return cls(shape, dtype, parts)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        """All of it, as it is stored."""
        parts = [part.to(self.dtype) for part in self.parts()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write tensors to ``path``, whole and on disk or not at all.

    One part of one tensor at a time is made, moved to CPU memory and written.

    Returns:
        the digests of every tensor's blocks, see :class:`Blocks`.

    Raises:
        ValueError: a tensor has not the shape announced for it, or a value has no place in the type that it
            is to be stored as.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        offsets = [start, end]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written, blocks = 0, BlockDigests()
            for part in tensor.parts():
                found = (written + len(part), *part.shape[1:]) if part.ndim else ()
                fits = len(found) == len(tensor.shape) and found[1:] == tensor.shape[1:]
                if not fits or found[:1] > tensor.shape[:1]:
                    raise _misshapen(path, name, found, tensor)
                memory = _memory(_cast(part, tensor.dtype, name))
                file.write(memory)
                blocks.update(memory)
                written += len(part) if part.ndim else 1
            if written != prod(tensor.shape[:1]):
                raise _misshapen(path, name, (written, *tensor.shape[1:]), tensor)
            digests[name] = blocks.finish()
    return digests


class StoredTensor(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str
    shape: Shape
    offset: int
    """Of its first byte in the file."""


class SafetensorsFile:
    """An open safetensors file. Read, not mapped: mapped pages would count as this process's memory.

    Raises:
        ValueError: its header cannot be read.
    """

    tensors: Mapping[str, StoredTensor]
    """By name."""
    metadata: Mapping[str, str]
    """What its writer said of it."""

    def __init__(self, path: Path, remedy: str = "copy it again, or use another checkpoint") -> None:
        """``remedy``: what to do about a damaged file."""
        self.path = path
        self._remedy = remedy
        self._file = path.open("rb")
        self.close = weakref.finalize(self, self._file.close)
        try:
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(min(length, path.stat().st_size)))
            self.metadata = dict(header.pop("__metadata__", None) or {})
            size = path.stat().st_size
            self.tensors = {name: _stored(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            self.close()
            raise self._damaged("its header cannot be read") from None

    def require(self, name: str, dtype: str, shape: Shape) -> None:
        """Refuse the file if it has not this tensor.

        Raises:
            ValueError: naming what there is.
        """
        stored = self.tensors.get(name)
        if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
            has = f"{stored.dtype} of shape {list(stored.shape)}" if stored else "nothing"
            raise self._damaged(f"for {name} it has {has}, not {dtype} of shape {list(shape)}")

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, contiguous fp32 on the CPU, from element ``start`` on of a tensor that is there.

        Raises:
            ValueError: it is stored as none of :data:`DTYPES`, or the file ends before.
        """
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise self._damaged(f"{name} is stored as {stored.dtype}, not as one of {', '.join(DTYPES)}")
        dtype, flat = DTYPES[stored.dtype], out.detach().view(-1)
        most = len(flat) if dtype == torch.float32 else CHUNK_BYTES // 4
        for first in range(0, len(flat), max(1, most)):
            part = flat[first : first + most]
            raw = part if dtype == torch.float32 else torch.empty(part.shape, dtype=dtype)
            self._fill(_memory(raw), stored.offset + (start + first) * dtype.itemsize, name)
            if raw is not part:
                part.copy_(raw)

    def read_verified(self, name: str, start: int, out: Tensor, blocks: Blocks) -> None:
        """As :meth:`read`, of one stored as fp32; the blocks touched are read to their ends and compared.

        Raises:
            ValueError: a block is not as it was written, or the file ends before.
        """
        stored, wanted = self.tensors[name], _memory(out.detach())
        size, end = 4 * prod(stored.shape), 4 * start + len(wanted)
        for number in range(4 * start // blocks.size, -(-end // blocks.size)):
            first, last = number * blocks.size, min((number + 1) * blocks.size, size)
            low, high = max(first, 4 * start), min(last, end)
            part = wanted[low - 4 * start : high - 4 * start]
            block = part if (low, high) == (first, last) else memoryview(bytearray(last - first))
            self._fill(block, stored.offset + first, name)
            if not blocks.holds(number, block):
                raise self._damaged(
                    f"bytes {stored.offset + first} to {stored.offset + last}, of {name}, are not what was "
                    "written there"
                )
            if block is not part:
                part[:] = block[low - first : high - first]

    def _fill(self, view: memoryview, offset: int, name: str) -> None:
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:  # a bad sector
                raise self._damaged(f"byte {offset}, of {name}, cannot be read ({error.strerror})") from None
            if not count:
                raise self._damaged(f"it ends at byte {offset}, within {name}")
            offset, view = offset + count, view[count:]

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.path} is damaged: {what}; {self._remedy}")


def open_checked(path: Path, wrong: str, remedy: str) -> SafetensorsFile:
    """A file whose whole header is first compared with its size.

    Raises:
        ValueError: they do not fit: the file ``wrong``, in words, and the ``remedy``.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {wrong} ({error}); {remedy}") from None
    return SafetensorsFile(path, remedy)


def _stored(entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    start = entry["data_offsets"][0]
    if type(start) is not int or not 0 <= start <= size - data:
        raise ValueError(f"a tensor cannot begin at {start!r}")
    return StoredTensor(entry["dtype"], tuple(entry["shape"]), data + start)


def _misshapen(path: Path, name: str, found: Shape, tensor: TensorToWrite) -> ValueError:
    return ValueError(f"cannot write {path}: {name} is {found}, not {tensor.shape}")


def _cast(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = part.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not torch.equal(cast.isfinite(), part.isfinite().cpu()):
        raise ValueError(
            f"{name} holds {part.abs().max().item():g}, which fp16 (largest value 65504) cannot hold; "
            "export as bf16 or fp32"
        )
    return cast


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
