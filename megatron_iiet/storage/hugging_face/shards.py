"""The safetensors files of a Hugging Face folder, one shard or many: read and written some rows at a time.

Read, not mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_iiet import durable

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Shape = tuple[int, ...]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK_BYTES = 16 << 20
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is."""

    path: Path
    dtype: str
    shape: Shape
    offset: int
    """Of its first byte in the file."""


class ShardReader:
    """The tensors of a folder by name; what nobody asks for is never read.

    Raises:
        ValueError: there are no safetensors files, one is missing, or it cannot be read as such.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = {
            name: stored for path in _weight_files(folder) for name, stored in _entries(path).items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name].path

    def check(self, expected: Mapping[str, Shape], described_by: str) -> None:
        """Refuse tensors (name → expected shape) that are missing or that cannot be read as these.

        Raises:
            ValueError: naming the tensor; ``described_by`` is the file that asks for it.
        """
        for name, shape in expected.items():
            stored = self._where.get(name)
            if stored is None:
                raise ValueError(
                    f"{self.folder} has no tensor {name} ({list(shape)}), which its {described_by} asks for; "
                    "give the complete checkpoint of a LlamaForCausalLM or IIETForCausalLM"
                )
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.path}: tensor {name} is {list(stored.shape)}, but {described_by} asks for "
                    f"{list(shape)}; weights and configuration do not belong together"
                )
            if stored.dtype not in _DTYPES:
                raise ValueError(
                    f"{stored.path}: tensor {name} is stored as {stored.dtype}; supported are "
                    f"{', '.join(_DTYPES)}, so save the checkpoint without quantisation"
                )

    def read_rows(self, name: str, first: int, out: Tensor) -> None:
        """Fill ``out``, contiguous fp32 [rows, …] on the CPU, from row ``first`` on of a checked tensor.

        Raises:
            ValueError: the file ends before, because something cut it off since it was opened.
        """
        stored = self._where[name]
        dtype, width = _DTYPES[stored.dtype], prod(stored.shape[1:])
        most = _rows_of(_CHUNK_BYTES, 4 * width)
        with stored.path.open("rb") as file:
            for start in range(0, len(out), most):
                part = out[start : start + most]
                raw = part if dtype == torch.float32 else torch.empty(part.shape, dtype=dtype)
                offset = stored.offset + (first + start) * width * dtype.itemsize
                view = _bytes_of(raw)
                while view:
                    count = os.preadv(file.fileno(), [view], offset)
                    if not count:
                        raise ValueError(
                            f"{stored.path} ends at byte {offset}, within {name}; download it again"
                        )
                    offset, view = offset + count, view[count:]
                if raw is not part:
                    part.copy_(raw)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that is made some rows at a time."""

    shape: Shape
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    """Its rows [first, last), fp32."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Mapping[str, TensorToWrite], max_shard_bytes: int) -> list[str]:
    """Write the tensors in their order, each file as full as ``max_shard_bytes`` allows, and an index of the
    files if there are several; the names of the files with tensors.

    A tensor is never cut: one that is larger has a file of its own.

    Raises:
        ValueError: a value has no place in the type that it is to be stored as.
    """
    shards: list[dict[str, TensorToWrite]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.bytes
    if len(shards) == 1:
        _write_file(folder / WEIGHTS_FILE, shards[0])
        return [WEIGHTS_FILE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    durable.write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return names


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` or ``2GiB``, as transformers reads them.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"'{text}' is no size of a file; give a number and a unit, such as 5GB or 500MB")
    return size


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object {{...}}")
    return content


def _write_file(path: Path, tensors: Mapping[str, TensorToWrite]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.bytes
        offsets = [start, end]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with durable.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            rows, width = tensor.shape[0], 4 * prod(tensor.shape[1:])
            most = _rows_of(_CHUNK_BYTES, width)
            for first in range(0, rows, most):
                last = min(first + most, rows)
                part = tensor.rows(first, last)
                assert tuple(part.shape) == (last - first, *tensor.shape[1:]), f"{name}: {part.shape}"
                file.write(_bytes_of(_cast(part, tensor.dtype, name)))


def _cast(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = part.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not torch.equal(cast.isfinite(), part.isfinite().cpu()):
        raise ValueError(
            f"{name} holds {part.abs().max().item():g}, which fp16 (largest value 65504) cannot hold; "
            "export as bf16 or fp32"
        )
    return cast


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of at least one dimension."""
    return tensor.view(torch.uint8).view(-1).numpy().data


def _rows_of(size: int, width: int) -> int:
    return max(1, size // width)


def _entries(path: Path) -> dict[str, _Stored]:
    try:
        with safe_open(path, framework="pt"):  # checks the whole header against the size of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        pickled = any(folder.glob("*.bin"))
        hint = (
            "its .bin files are pickles, which can run code and are never read; save it with safetensors"
            if pickled
            else "give the folder of a complete checkpoint"
        )
        raise ValueError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; {hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r}, but must name a file for every tensor")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names '{name}', but must name .safetensors files of its folder"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing; download the checkpoint again")
        files.append(folder / name)
    return files
