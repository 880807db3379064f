"""Writing a safetensors file one tensor at a time: the library's own writer wants all of them in memory."""

from __future__ import annotations

import json
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
            file.write(tensor.view(-1).numpy().data.cast("B"))
