"""A set of ranks that exchange tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.11 has these two under other names, of which 2.13 warns.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


class Group:
    """Ranks of one line of the process grid; one rank alone sends nothing."""

    def __init__(self, ranks: Sequence[int] = (0,), rank: int = 0, handle: Any = None) -> None:
        """``ranks``: world ranks in order; ``rank``: this process's place among them; ``handle``: the
        process group, needed where there is more than one rank."""
        assert handle is not None or len(ranks) == 1
        self.ranks = tuple(ranks)
        self.size = len(ranks)
        self.rank = rank
        self.handle = handle

    def all_reduce(self, x: Tensor, *, asynchronous: bool = False) -> Any:
        """Sum over the group, in place; returns the handle to wait for if ``asynchronous``."""
        if self.size == 1:
            return None
        return dist.all_reduce(x, group=self.handle, async_op=asynchronous)

    def maximum(self, x: Tensor) -> None:
        """The largest of the group's, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.handle)

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, [size, *x.shape]."""
        out = x.new_empty((self.size, *x.shape))
        if self.size == 1:
            return out.copy_(x.unsqueeze(0))
        _all_gather(out.flatten(), x.contiguous().flatten(), group=self.handle)
        return out

    def reduce_scatter(self, x: Tensor, *, asynchronous: bool = False) -> tuple[Tensor, Any]:
        """Of [size, …] summed over the group, this rank's part […]; and the handle to wait for."""
        out = x.new_empty(x.shape[1:])
        if self.size == 1:
            return out.copy_(x[0]), None
        work = _reduce_scatter(
            out.flatten(), x.contiguous().flatten(), group=self.handle, async_op=asynchronous
        )
        return out, work

    def gather_objects(self, value: Any) -> list[Any]:
        """A picklable object of every rank, in order, on every rank; not for hot paths."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the group, in place; the same bits on every rank."""
        self.all_reduce(x)
        return x.div_(self.size)


def sum_in_fp32(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, accumulated in fp32 and rounded once."""
    total = x.to(torch.float32, copy=True)
    group.all_reduce(total)
    return total.to(x.dtype)
