"""Which source a sample comes from: exact weights, computed from the sample's number alone.

Sources with weights w_1 … w_k that sum to 1 share the samples 0, 1, 2, … such that source i has w_i t of the
first t samples, give or take less than one, for every t (less than two where weights have no common
denominator below :data:`BLOCK`). Nothing is drawn and nothing is stored: a run resumes from one integer, and
every rank of any number of ranks agrees.

Samples are dealt in blocks of L slots:

* Up to the border of block b source i has had ``S_i - S_{i-1}`` samples, where ``S_i = floor((w_1 + … + w_i)
  b L + 1/2)`` in exact integers. Rounding sums makes the counts add up to b L and keeps each within one of
  its share, however large b is.
* Inside the block the D_i slots of source i are a periodic task on a machine that serves one slot at a time:
  its j-th one may not come before ``floor(j L / D_i)`` and must come before ``ceil((j + 1) L / D_i)``.
  Serving the earliest deadline first meets all of them (the shares add up to 1; Baruah et al. 1996,
  "Proportionate progress", for the windows), which is to say that every prefix of t slots has t D_i / L, give
  or take less than one.

With weights that have a common denominator M of at most :data:`BLOCK` (all weights of up to five decimals
that sum to 1), L is M, borders are exact, and the bound of less than one holds for every prefix of the run.
With others, e.g. numbers of tokens, L is :data:`BLOCK`, and the two roundings add up: less than one at
borders, less than two in between.

Any run of samples from a to b is the difference of two prefixes, with twice the bound.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.mmididx import Int32Array, Int64Array

BLOCK = 100_000
"""Most slots of a block; the smallest possible weight is one slot in so many."""


class Blend:
    """Deals samples to weighted sources.

    Args:
        weights: one positive number a source, of any sum. A float counts as the decimal it prints as: 0.1 is
            a tenth.

    Raises:
        ValueError: there are no weights, or one is not positive and finite, or is less than 1 / BLOCK of all.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._parts = _integer_parts(weights)
        self._total = sum(self._parts)
        self._length = min(self._total, BLOCK)
        self._sums = list(accumulate(self._parts, initial=0))

    @property
    def shares(self) -> list[float]:
        """The weights, scaled to sum to 1."""
        return [part / self._total for part in self._parts]

    def __call__(self, samples: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Source of each sample, and how many samples of that source come before it; both int64 [n].

        ``samples``: numbers from 0, int [n], in any order.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        sources, ranks = np.zeros_like(numbers), numbers.copy()
        if len(self._parts) == 1:
            return sources, ranks
        blocks, slots = np.divmod(numbers, self._length)
        if self._length == self._total:  # every block is the same
            source_of, rank_of = _arrange(tuple(self._parts))
            sources = source_of[slots].astype(np.int64)
            return sources, blocks * np.array(self._parts)[sources] + rank_of[slots]
        for block in np.unique(blocks).tolist():
            inside = blocks == block
            before, after = self._border(block), self._border(block + 1)
            source_of, rank_of = _arrange(tuple(b - a for a, b in zip(before, after, strict=True)))
            sources[inside] = source_of[slots[inside]]
            ranks[inside] = np.array(before)[sources[inside]] + rank_of[slots[inside]]
        return sources, ranks

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples each source has."""
        block, slots = divmod(samples, self._length)
        counts = self._border(block)
        if slots:
            sources, ranks = self(np.arange(samples - slots, samples))
            last = np.full(len(counts), -1)
            np.maximum.at(last, sources, ranks)
            counts = [max(count, int(rank) + 1) for count, rank in zip(counts, last, strict=True)]
        return counts

    def _border(self, block: int) -> list[int]:
        """Samples of each source before block ``block``."""
        dealt = block * self._length
        rounded = [(2 * part * dealt + self._total) // (2 * self._total) for part in self._sums]
        return [after - before for before, after in pairwise(rounded)]


@lru_cache(maxsize=16)  # weights that do not divide the block give a few neighbouring counts in turn
def _arrange(counts: tuple[int, ...]) -> tuple[Int32Array, Int32Array]:
    """Spread ``counts[i]`` slots of each source evenly over a block of L = sum(counts) slots.

    Returns the source of each slot and its place among the slots of that source, int32 [L] each.
    """
    length = sum(counts)
    sources, ranks = (np.empty(length, dtype=np.int32) for _ in range(2))
    waiting = [(_deadline(0, count, length), source, 0) for source, count in enumerate(counts) if count]
    heapq.heapify(waiting)
    released: dict[int, list[tuple[int, int, int]]] = {}  # by slot
    for slot in range(length):
        for unit in released.pop(slot, ()):
            heapq.heappush(waiting, unit)
        deadline, source, rank = heapq.heappop(waiting)
        assert deadline > slot
        sources[slot], ranks[slot] = source, rank
        count, following = counts[source], rank + 1
        if following < count:
            release = max(slot + 1, following * length // count)
            unit = (_deadline(following, count, length), source, following)
            released.setdefault(release, []).append(unit)
    return sources, ranks


def _deadline(rank: int, count: int, length: int) -> int:
    return -(-(rank + 1) * length // count)


def _integer_parts(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of the weights."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"A weight of the blend is {weight}; weights must be finite and greater than 0.")
    exact = [Fraction(str(weight)) for weight in weights]
    if not exact:
        raise ValueError("The blend has no weights; give one for each source.")
    denominator = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*parts)
    parts = [part // divisor for part in parts]
    # Of a share of at least one slot a block, roundings at two borders leave no less than zero.
    if min(parts) * BLOCK < sum(parts):
        smallest = weights[parts.index(min(parts))]
        raise ValueError(
            f"The weight {smallest} of the blend is less than 1/{BLOCK} of the sum {sum(weights):g}; raise "
            "it, or leave that source out."
        )
    return parts
