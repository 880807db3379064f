"""Safetensors files a part at a time: the library's own writer wants all tensors in memory, its reader maps
files, whose pages then count as this process's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_iiet.durable import replacing

ITEM_BYTES = 4

TensorSource = tuple[tuple[int, ...], Callable[[], Tensor]]
"""A tensor's shape, and what makes it when its turn comes."""


def write_safetensors(path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
    """Write fp32 tensors to ``path``, whole and on disk or not at all.

    One tensor at a time is made, moved to CPU memory and written.

    Raises:
        ValueError: a tensor has not the shape announced for it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + ITEM_BYTES * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, make) in tensors.items():
            tensor = make().detach().to("cpu", torch.float32).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"cannot write {path}: {name} is {tuple(tensor.shape)}, not {shape}")
            file.write(_memory(tensor.view(-1)))


class SafetensorsFile:
    """An open safetensors file. Read, not mapped: mapped pages would count as this process's memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        self._data = 8 + length
        try:
            self._tensors = json.loads(self._file.read(min(length, path.stat().st_size)))
        except ValueError:
            self.close()
            raise self._damaged("its header cannot be read") from None

    def read(self, key: str, numel: int, start: int, target: Tensor) -> None:
        """Fill a contiguous CPU tensor from element ``start`` on of the tensor ``key`` of [numel]."""
        stored = self._tensors.get(key, {})
        if (stored.get("dtype"), stored.get("shape")) != ("F32", [numel]):
            raise self._damaged(f"for {key} it has {stored or 'nothing'}, not F32 of shape [{numel}]")
        offset = self._data + stored["data_offsets"][0] + ITEM_BYTES * start
        view = _memory(target)
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise self._damaged(f"it ends at byte {offset}, within {key}")
            offset, view = offset + count, view[count:]

    def close(self) -> None:
        self._file.close()

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._path} is damaged: {what}; copy it again, or use another checkpoint")


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of one dimension that is not empty."""
    return tensor.numpy().data.cast("B")
