"""The backward pass of all merges of one history, transposed: one pass over memory a layer.

Merge m reads consecutive entries F̃_j, most often from F̃_0 on, with coefficients A[m, j]. It hands on the
gradient G_m of its result only, and what an entry receives is computed where it is complete::

    dF̃_j = direct_j + Σ_m A[m, j] G_m          dA[m, j] = ⟨F̃_j, G_m⟩

Three autograd nodes carry it. *Publish* sits behind each entry: every merge that reads the entry has an
edge to it (without a gradient), so its backward runs when all G_m are there. *Merge* stores G_m. *Root*, in
front of all of them, gets the rows' gradients: parameters need not be where they are read.

Gradients are stored under the row they belong to, never appended: running a layer's forward again to
recompute it changes nothing. One instance serves one forward pass of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.ops.backends import get_backend


class TransposedMerge:
    """Merges of one history whose gradients are computed entry by entry.

    Args:
        rows: the parameters that merges multiply the entries with, each 1-dimensional; any of them may stay
            unused.
        backend: a name from :func:`megatron_iiet.ops.resolve_backend`.
        rows_at_once: return each row's gradient from its own merge, for one more reading of the entries.
            For parameters that are whole only while their module runs (ZeRO-3).
        release: called with an entry's number when nothing will read it any more. A weak method: its owner
            holds entries, which hold this.
    """

    def __init__(
        self,
        rows: Sequence[nn.Parameter],
        backend: str,
        *,
        rows_at_once: bool = False,
        release: WeakMethod[Callable[[int], None]] | None = None,
    ) -> None:
        self._backend = get_backend(backend)
        self._release = release
        self._rows_at_once = rows_at_once
        self._index = {id(row): i for i, row in enumerate(rows)}
        # Row by entry; wider as there are more entries. (The parameters may be in parts elsewhere until the
        # module they belong to runs, as under ZeRO-3: size and device are not known yet.)
        self._values = torch.zeros(len(rows), 0, dtype=torch.float32)
        self._received = torch.zeros_like(self._values)
        self._sizes: dict[int, int] = {}
        self._reads: dict[int, range] = {}  # entries that a row multiplies, once a merge has read them
        self._gradients: dict[int, Tensor | None] = {}  # G of a row's merge; None if nobody used the merge
        self._first: int | None = None  # entry published first: the last one whose gradient is computed
        self._finished = False
        # Held by the caller through `root`: if the nodes were reachable from here, the cycle through them
        # would keep every gradient until the garbage collector comes by.
        self._rows = list(rows)

    def root(self) -> Tensor:
        """What every published entry hangs on, [0]."""
        if self._rows_at_once:
            return self._values.new_empty(0)
        return cast(Tensor, _Root.apply(self, *self._rows))

    def publish(self, entry: int, increment: Tensor, root: Tensor) -> Tensor:
        """Entry number ``entry`` of the history as merges must read it: ``increment`` [..., d], unchanged.

        Entries are published in their order, from any number on.
        """
        if self._first is None:
            self._first = entry
        return cast(Tensor, _Publish.apply(self, entry, increment, root))

    def merge(
        self,
        residual: Tensor | None,
        entries: Sequence[Tensor],
        rows: Sequence[nn.Parameter],
        own: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, ...]:
        """``residual + Σ_j rows[r][j] · entries[j] (+ rows[r][k] · own)``, [..., d], for each of the rows.

        ``entries``: k ≥ 1 published ones in order, ``first`` the number of the first; ``rows``: of this
        history, each read by one merge only; ``own``: an increment that is no entry yet, with one row only.
        """
        indices = [self._index[id(row)] for row in rows]
        k = len(entries)
        self._widen(first + k, entries[0].device)
        for i, row in zip(indices, rows, strict=True):
            self._values[i, first : first + k] = row.detach()[:k]
            self._reads[i], self._sizes[i] = range(first, first + k), row.numel()
        own_coefficient = None
        if own is not None:
            assert len(rows) == 1, "an increment of its own takes one row"
            own_coefficient = rows[0].float()[k : k + 1]
        at_once = [row.float()[:k] for row in rows] if self._rows_at_once else []
        merged = _Merge.apply(self, indices, k, residual, own, own_coefficient, *entries, *at_once)
        return cast(tuple[Tensor, ...], merged)

    def _forward(
        self, rows: list[int], residual: Tensor | None, increments: Sequence[Tensor], own: Tensor | None
    ) -> tuple[Tensor, ...]:
        read = self._reads[rows[0]]
        coefficients = self._values[_selection(rows), read.start : read.stop]
        if len(rows) > 1:
            return self._backend.merge_norm(residual, increments, coefficients, None, 0.0)[0].unbind()
        coefficients = coefficients[0] if own is None else torch.cat((coefficients[0], own))
        return (self._backend.merge_norm(residual, increments, coefficients, None, 0.0)[0],)

    def _widen(self, entries: int, device: torch.device) -> None:
        width = self._values.shape[1]
        if entries > width:
            missing = (0, max(entries, 2 * width, 8) - width)
            tables = (self._values, self._received)
            self._values, self._received = (F.pad(t.to(device), missing) for t in tables)

    def _store(self, row: int, gradient: Tensor | None) -> None:
        if self._finished or row in self._gradients:
            raise RuntimeError(
                "backward ran through a merge of the history twice (retain_graph=True?); its gradients are "
                "computed once and not kept. Run the forward pass again, or set ops.history_gradient to "
                "per_edge"
            )
        self._gradients[row] = gradient

    def _collect(self, entry: int, increment: Tensor, direct: Tensor | None) -> Tensor | None:
        """What entry number ``entry`` receives; notes the rows' gradients on the way."""
        rows = sorted(row for row, read in self._reads.items() if entry in read)
        missing = [row for row in rows if row not in self._gradients]
        if missing:
            raise RuntimeError(
                f"entry {entry} of the history was merged by row(s) {missing}, but no gradient came back "
                "from there: the result was detached or left out of the loss. Set ops.history_gradient to "
                "per_edge"
            )
        used = {row: g for row in rows if (g := self._gradients[row]) is not None}
        if not used:
            return direct
        selection = _selection(list(used))
        column = self._values[selection, entry]
        gradient, received = self._backend.transposed_merge(
            direct, increment, list(used.values()), column, not self._rows_at_once
        )
        if not self._rows_at_once:
            self._received[selection, entry] = received
        if entry == self._first and (self._rows_at_once or not any(row.requires_grad for row in self._rows)):
            self._finish()  # nobody asks for the rows' gradients
        return gradient

    def _finish(self) -> list[Tensor | None]:
        """The rows' gradients; nothing is kept."""
        self._finished = True
        self._gradients.clear()
        gradients: list[Tensor | None] = []
        for i, row in enumerate(self._rows):
            if i not in self._reads:
                gradients.append(None)
                continue
            read, gradient = self._reads[i], self._received.new_zeros(self._sizes[i])
            gradient[: len(read)] = self._received[i, read.start : read.stop]
            gradients.append(gradient.to(row.dtype))
        return gradients


def _selection(rows: list[int]) -> slice | list[int]:
    """An index of ``rows``; a slice where one does, which costs no copy to the device."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return rows


def _first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses ``create_graph=True``: what is stored on the way has no graph, and would pass for constant."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a merge of the history has no second derivatives (create_graph=True) with "
                "ops.history_gradient transposed; set it to per_edge and ops.backend to reference"
            )
        return backward(ctx, *gradients)

    return checked


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merges: TransposedMerge, *rows: Tensor) -> Tensor:
        ctx.merges = merges
        ctx.set_materialize_grads(False)
        return rows[0].new_empty(0)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.merges._finish()


class _Publish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merges: TransposedMerge, entry: int, increment: Tensor, root: Tensor) -> Tensor:
        ctx.merges, ctx.entry = merges, entry
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(increment)
        return increment.view_as(increment)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, direct: Tensor | None) -> tuple[Tensor | None, ...]:
        (increment,) = ctx.saved_tensors
        gradient = ctx.merges._collect(ctx.entry, increment, direct)
        release = ctx.merges._release and ctx.merges._release()
        if release:
            release(ctx.entry)
        return None, None, gradient, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        merges: TransposedMerge,
        rows: list[int],
        count: int,
        residual: Tensor | None,
        own: Tensor | None,
        own_coefficient: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        entries, at_once = tensors[:count], tensors[count:]
        ctx.merges, ctx.rows, ctx.count = merges, rows, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(own, own_coefficient, *(tensors if at_once else ()))
        increments = entries if own is None else (*entries, own)
        return merges._forward(rows, residual, increments, own_coefficient)

    @staticmethod
    @_first_derivative
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        for row, gradient in zip(ctx.rows, gradients, strict=True):
            ctx.merges._store(row, gradient)
        own, own_coefficient, *tensors = ctx.saved_tensors
        entries, at_once = tensors[: ctx.count], tensors[ctx.count :]
        received = [gradient for gradient in gradients if gradient is not None]
        for_residual = for_own = for_coefficient = None
        if received and ctx.needs_input_grad[3]:
            for_residual = received[0] if len(received) == 1 else torch.stack(received).sum(0)
        merge_gradients = ctx.merges._backend.merge_gradients
        if received and own is not None:
            (for_own,), for_coefficient = merge_gradients(received[0], (own,), own_coefficient, True)
        for_rows = [
            None if gradient is None else merge_gradients(gradient, entries, row, False)[1]
            for gradient, row in zip(gradients, at_once, strict=False)
        ]
        nothing = (None,) * ctx.count
        return None, None, None, for_residual, for_own, for_coefficient, *nothing, *for_rows
