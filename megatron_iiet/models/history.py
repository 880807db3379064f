"""The increments that layers kept, for later layers to merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from megatron_iiet.ops import TransposedMerge, merge_norm


class History:
    """The kept increments F̃_0, F̃_1, … of one forward pass of one micro-batch, each [B, T, d] (under sequence
    parallelism T is this rank's part of the sequence).

    Solvers read it through :meth:`merge` only; the stack that runs the layers appends. A merge names how
    many entries it reads, never "all so far": recomputing a layer in the backward pass, when later layers
    have long appended theirs, must read what the first run read.
    """

    def __init__(
        self,
        entries: Iterable[Tensor] = (),
        *,
        first: int = 0,
        rows: Sequence[nn.Parameter] = (),
        backend: str = "reference",
        transposed: bool = False,
        rows_at_once: bool = False,
    ) -> None:
        """Start a history.

        Args:
            entries: none, the embedding for solvers that merge it too, or what an earlier pipeline stage
                handed on.
            first: the number of the first of ``entries``; there are none before it.
            rows: the coefficient parameters that layers will merge with.
            backend: of :func:`megatron_iiet.ops.merge_norm`.
            transposed: compute gradients entry by entry (:mod:`megatron_iiet.ops.transposed`) and not merge
                by merge.
            rows_at_once: with it, see :class:`megatron_iiet.ops.TransposedMerge`.
        """
        self.backend = backend
        self._entries: list[Tensor | None] = [None] * first
        self._merges: TransposedMerge | None = None
        if transposed and rows and torch.is_grad_enabled():
            self._merges = TransposedMerge(
                rows, backend, rows_at_once=rows_at_once, release=WeakMethod(self._release)
            )
            self._root = self._merges.root()
        for entry in entries:
            self.append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, numbers: range) -> list[Tensor]:
        """The entries of these numbers, to hand on to the next pipeline stage."""
        assert numbers.stop <= len(self._entries), (
            f"entries up to {numbers.stop} are read, but the history holds {len(self._entries)}"
        )
        entries = self._entries[numbers.start : numbers.stop]
        assert all(entry is not None for entry in entries), (
            "an entry is read after its gradient was computed, or was never handed on to this stage"
        )
        return cast(list[Tensor], entries)

    def _release(self, entry: int) -> None:
        """Layers that wait to be recomputed hold the history, and need only what lies before them."""
        self._entries[entry] = None

    def append(self, increment: Tensor | None) -> None:
        """Keep a layer's increment, [B, T, d]; None: one that nobody will read."""
        if self._merges is not None and increment is not None:
            increment = self._merges.publish(len(self._entries), increment, self._root)
        self._entries.append(increment)

    def merge(
        self,
        residual: Tensor | None,
        rows: Sequence[nn.Parameter],
        count: int,
        own: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, ...]:
        """``residual + Σ_{j<count} rows[r][j] · entry_{first+j}``, [B, T, d], for each of the rows from one
        reading of the entries; with ``own``, the layer's increment (and one row), ``+ row[count] · own``."""
        entries = self.read(range(first, first + count))
        if self._merges is not None and entries and torch.is_grad_enabled():
            return self._merges.merge(residual, entries, rows, own, first)
        increments = entries if own is None else [*entries, own]
        # .float(): ZeRO-3 in bf16 cannot keep coefficients fp32.
        values = [row.float()[: len(increments)] for row in rows]
        if len(rows) == 1:
            return (merge_norm(residual, increments, values[0], backend=self.backend).merged,)
        return merge_norm(residual, increments, torch.stack(values), backend=self.backend).merged.unbind()
