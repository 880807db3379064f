"""How a parameter is split over the tensor-parallel ranks: integer arithmetic on rows or columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One split of a parameter; a parameter that every rank holds whole has none (``None``).

    A rank's local tensor is the concatenation, along ``dim``, of its even part of every block: with the
    blocks (q, k, v), rank 0 of 2 holds the first halves of q, k and v.
    """

    dim: int
    """0: rows (column-parallel linear map, vocabulary), 1: columns (row-parallel linear map)."""
    blocks: tuple[int, ...]
    """Sizes along ``dim`` of the sub-matrices that are each split evenly, e.g. (q, k, v) or (n,)."""

    def local_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Shape of a rank's part of a tensor of ``shape`` split over ``size`` ranks.

        Raises:
            ValueError: the blocks do not make up ``shape``, or one is not divisible by ``size``.
        """
        if not 0 <= self.dim < len(shape) or sum(self.blocks) != shape[self.dim]:
            raise ValueError(
                f"blocks {list(self.blocks)} of dimension {self.dim} sum to {sum(self.blocks)} and do not "
                f"make up a tensor of shape {list(shape)}; give the sizes of all its blocks"
            )
        return (*shape[: self.dim], sum(self._widths(size)), *shape[self.dim + 1 :])

    def slices(self, size: int, rank: int) -> list[slice]:
        """What rank ``rank`` of ``size`` holds of the global tensor along ``dim``, in its local order.

        Raises:
            ValueError: a block is not divisible by ``size``, or there is no such rank.
        """
        if not 0 <= rank < size:
            raise ValueError(f"there is no tensor-parallel rank {rank} of {size}; ranks count from 0")
        starts = accumulate(self.blocks, initial=0)
        return [
            slice(start + rank * width, start + (rank + 1) * width)
            for start, width in zip(starts, self._widths(size), strict=False)  # the last start is the end
        ]

    def take(self, full: Tensor, size: int, rank: int) -> Tensor:
        """The local tensor of rank ``rank`` of ``size``: a contiguous copy; errors as of the above."""
        self.local_shape(tuple(full.shape), size)
        parts = [full.narrow(self.dim, s.start, s.stop - s.start) for s in self.slices(size, rank)]
        return torch.cat(parts, self.dim).contiguous()

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor (a copy) from the local tensors of all ranks in order; inverse of :meth:`take`."""
        widths = self._widths(len(shards))
        ranks = [shard.split(widths, self.dim) for shard in shards]
        return torch.cat([part for block in zip(*ranks, strict=True) for part in block], self.dim)

    def _widths(self, size: int) -> list[int]:
        """Width of a rank's part of every block."""
        for block in self.blocks:
            if size < 1 or block % size:
                raise ValueError(
                    f"a block of {block} (of {list(self.blocks)}) does not split evenly over {size} "
                    "tensor-parallel ranks; choose a tensor-parallel size that divides every block"
                )
        return [block // size for block in self.blocks]
