"""The parameters of a model on disk, whatever form it has there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from megatron_iiet.storage.safetensors_stream import Shape


class RowSource(Protocol):
    """Stored parameters by our names; the vocabulary's padding may be there or not."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a parameter, fp32 on the CPU; a scalar is one row."""


class Weights(RowSource, Protocol):
    """Those of a whole model."""

    def __iter__(self) -> Iterator[str]: ...

    def holding(self, name: str, row: int) -> str:
        """In which tensor of which file a row is, in words."""


class StoredParameters(Weights, Mapping[str, Tensor]):
    """Parameter name → fp32 tensor, read when asked for, whole or some rows of one.

    Raises:
        ValueError: what is read is missing or damaged.
    """

    shapes: Mapping[str, Shape]
    """Of all parameters, as they are stored."""

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
