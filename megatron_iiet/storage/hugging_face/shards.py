"""The files of weights of a Hugging Face folder, one shard or many."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_iiet import durable
from megatron_iiet.config.hugging_face import read_json
from megatron_iiet.storage.hugging_face.pickled import OpenPickle, PickledFile
from megatron_iiet.storage.safetensors_stream import (
    DTYPES,
    SafetensorsFile,
    Shape,
    TensorToWrite,
    open_checked,
    write_safetensors,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin")
"""Names of weights, the one to read first; with ``.index.json`` behind it that of an index of shards."""
_METADATA = {"format": "pt"}  # what transformers asks of a file
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class ShardReader:
    """The tensors of a folder by name; what nobody asks for is never read.

    Raises:
        ValueError: there are no files of weights, one is missing, or it cannot be read as such.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        opened = OpenPickle()
        files = [_open(path, opened) for path in _weight_files(folder)]
        self._where = {name: file for file in files for name in file.tensors}

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
            file = self._where.get(name)
            if file is None:
                raise ValueError(
                    f"{self.folder} has no tensor {name} ({list(shape)}), which its {described_by} asks for; "
                    "give a complete checkpoint"
                )
            stored = file.tensors[name]
            if stored.shape != shape:
                raise ValueError(
                    f"{file.path}: tensor {name} is {list(stored.shape)}, but {described_by} asks for "
                    f"{list(shape)}; weights and configuration do not belong together"
                )
            if stored.dtype not in DTYPES:
                raise ValueError(
                    f"{file.path}: tensor {name} is stored as {stored.dtype}; supported are "
                    f"{', '.join(DTYPES)}, so save the checkpoint in one of them"
                )

    def read_rows(self, name: str, first: int, out: Tensor) -> None:
        """Fill ``out``, contiguous fp32 [rows, …] on the CPU, from row ``first`` on of a checked tensor.

        Raises:
            ValueError: the file ends before, because something cut it off since it was opened.
        """
        file = self._where[name]
        file.read(name, first * prod(file.tensors[name].shape[1:]), out)


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
        write_safetensors(folder / WEIGHTS_FILE, shards[0], _METADATA)
        return [WEIGHTS_FILE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, _METADATA)
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


def _open(path: Path, opened: OpenPickle) -> SafetensorsFile | PickledFile:
    if path.suffix == ".bin":
        return PickledFile(path, opened)
    return open_checked(path, "is not a readable safetensors file", "download it again")


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _indexed_files(index, Path(name).suffix)
    names = ", ".join(f"{name} or {name}.index.json" for name in _WEIGHTS)
    raise ValueError(f"{folder} has no {names}; give the folder of a complete checkpoint")


def _indexed_files(index: Path, suffix: str) -> list[Path]:
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r}, but must name a file for every tensor")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or not name.endswith(suffix):
            raise ValueError(
                f"{index}: weight_map names '{name}', but must name {suffix} files of its folder"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing; download the checkpoint again")
        files.append(folder / name)
    return files
