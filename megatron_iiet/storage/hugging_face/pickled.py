"""Files of ``torch.save`` with tensors by name, as older checkpoints have them (``pytorch_model.bin``). They
are pickles, of which nothing but tensors is made: no code that they name runs."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_iiet.storage.safetensors_stream import NAMES, StoredTensor


class PickledFile:
    """One file, mapped while its tensors are read.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """

    def __init__(self, path: Path, opened: OpenPickle) -> None:
        self.path = path
        self._opened = opened
        self.tensors = {name: _described(tensor) for name, tensor in opened.load(path).items()}
        """By name."""

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, contiguous fp32 on the CPU, from element ``start`` on of a tensor that is there."""
        flat = self._opened.load(self.path)[name].reshape(-1)
        out.view(-1).copy_(flat[start : start + out.numel()])


class OpenPickle:
    """The file read last: the tensors of one at a time are in memory, or mapped into it."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}

    def load(self, path: Path) -> Mapping[str, Tensor]:
        """The tensors of a file by name.

        Raises:
            ValueError: as :class:`PickledFile`.
        """
        if path != self._path:
            self._path, self._tensors = None, {}  # before the next one is there
            self._tensors = _load(path)
            self._path = path
        return self._tensors


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a pickle that is none makes of the reader
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise ValueError(
                f"{path} asks for {unsafe[1]}, which no weight needs and which could run code; it is not "
                "read, so save the checkpoint with safetensors"
            ) from None
        raise ValueError(f"{path} is not a readable file of torch.save; download it again") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        for name, tensor in found.items()
    ):
        raise ValueError(f"{path} holds more than tensors by name; save the state_dict of the model alone")
    for name, tensor in found.items():
        if tensor.is_meta:
            raise ValueError(
                f"{path}: tensor {name} has a shape and no values, as of a model that was never loaded; save "
                "the whole model"
            )
    return found


def _described(tensor: Tensor) -> StoredTensor:
    dtype = NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return StoredTensor(dtype, tuple(tensor.shape), 0)
