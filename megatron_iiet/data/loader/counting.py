"""How many targets a global batch has: every rank counts those of its own rows, and the threads that read add
them up ahead of time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_KEPT = 4096  # batches: more than threads are ever ahead of each other


class Targets:
    """Targets of global batches by number, over all ranks.

    Sums are made in the order of batches whichever is asked for, so that ranks that read ahead in other paces
    make the same ones. A rank that cannot count its rows takes part all the same, and all ranks hear of it.
    """

    def __init__(
        self, count: Callable[[int], int], add_up: Callable[[Tensor], object] | None, first: int
    ) -> None:
        """``count``: those of this rank's rows of a batch; ``add_up``: adds int64 [n] up over the ranks, in
        place (None: there are no others); ``first``: the first batch."""
        self._count, self._add_up, self._next = count, add_up, first
        self._found: dict[int, int | Exception] = {}
        self._lock = threading.Lock()
        self.waiting = False
        """Whether a thread waits for the other ranks."""

    def __call__(self, batch: int) -> int:
        """Targets of a batch; every batch is asked for by every rank, or made up for by :meth:`settle`."""
        self.settle(batch)
        found = self._found[batch]
        if isinstance(found, Exception):
            raise found
        return found

    def settle(self, batch: int) -> None:
        """Make the sums up to this batch, whose errors, if any, nobody hears of."""
        with self._lock:
            while self._next <= batch:
                self._found[self._next] = self._sum(self._next)
                self._found.pop(self._next - _KEPT, None)
                self._next += 1

    def _sum(self, batch: int) -> int | Exception:
        own, failure = 0, None
        try:
            own = self._count(batch)
        except Exception as error:  # the others wait for a number
            failure = error
        if self._add_up is None:
            return failure or own
        sums = torch.tensor([own, failure is not None])
        self.waiting = True
        try:
            self._add_up(sums)
        except Exception as error:
            return failure or RuntimeError(f"another rank has ended, whose own message says why ({error})")
        finally:
            self.waiting = False
        total, failures = sums.tolist()
        if failures:
            return failure or RuntimeError(f"{failures} other rank(s) could not, whose messages say why")
        return int(total)
