"""Which windows validation reads, by a rule with a name, and who reads them.

``spread``
    Each source of a blend gives its share of the samples, at most all that it has; what it lacks comes from
    the others. Its windows are the first of all in the order of their numbers' bits read backwards: so many
    as are wanted lie evenly over the split, and a smaller set is part of a larger one.
``first``
    The first windows of the blend, up to where a source has no more. It is there for runs that began with it:
    the first documents of a split are neighbours in a file.

Neither depends on ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.data.loader.batches import listed
from megatron_iiet.data.loader.blend import Blend
from megatron_iiet.data.loader.samples import Samples

FIRST, SPREAD = "first", "spread"
RULES = {FIRST: 0, SPREAD: 1}
"""Rules, and their numbers in logs. Losses under two rules are of two sets of windows, not to be compared."""


class ValidationBatch(NamedTuple):
    """One rank's rows of a validation batch."""

    tokens: torch.Tensor  # int64 [B, T + 1]
    weights: torch.Tensor  # float32 [B]: 1 for a sample, 0 for a filler row
    positions: torch.Tensor | None = None  # int64 [B, T + 1] as in Batch


class ValidationBatches:
    """The windows that validation reads, dealt to the ranks as in training; re-iterable.

    Every rank gets the same number of batches of the same shape, so collectives match by construction. Where
    the samples run out, rows are filled with copies of the first one of weight 0: a mean weighted by
    ``ValidationBatch.weights`` is over exactly :attr:`samples` samples whatever the number of ranks.

    Args:
        sources: what to read.
        weights: of the sources, as in training.
        samples: wanted; fewer if all sources together have no more.
        micro_batch_size: B.
        dp_rank, dp_size: this data-parallel rank and the number of ranks.
        rule: which windows, a key of :data:`RULES`.

    Raises:
        ValueError: there is nothing to read, or no such rule.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        weights: Sequence[float] = (1.0,),
        *,
        samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        rule: str = SPREAD,
    ) -> None:
        lengths = [len(source) for source in sources]
        if rule not in RULES:
            raise ValueError(
                f"the run validates on windows of the rule '{rule}', which this version does not know "
                f"({', '.join(RULES)}); go on with the version that it was started with"
            )
        if samples < 1 or not any(lengths):
            raise ValueError(
                f"Nothing to validate on: {samples} samples wanted, the split has {listed(lengths)} windows; "
                "give validation a share in data.split and evaluation.samples at least 1."
            )
        choose = _first if rule == FIRST else _spread
        self.sources, self.rule = sources, rule
        self._of, self._windows = choose(weights, lengths, samples)
        self.samples = len(self._of)
        self.counts = np.bincount(self._of, minlength=len(sources)).tolist()
        """Samples from each source."""
        self._size, self._rank, self._ranks = micro_batch_size, dp_rank, dp_size

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-self.samples // (self._size * self._ranks))

    def __iter__(self) -> Iterator[ValidationBatch]:
        for batch in range(len(self)):
            first = (batch * self._ranks + self._rank) * self._size
            rows = range(first, first + self._size)
            tokens = torch.empty(self._size, self.sources[0].sequence_length + 1, dtype=torch.int64)
            positions = torch.empty_like(tokens) if self.sources[0].has_positions else None
            for row, sample in enumerate(row if row < self.samples else 0 for row in rows):
                own = None if positions is None else positions[row].numpy()
                source = self.sources[int(self._of[sample])]
                source.fill(int(self._windows[sample]), tokens[row].numpy(), own)
            weights = torch.tensor([float(row < self.samples) for row in rows])
            yield ValidationBatch(tokens, weights, positions)


def shares(weights: Sequence[float], lengths: Sequence[int], samples: int) -> list[int]:
    """How many of ``samples`` come from each source, of which none gives more than its length."""
    counts, rest = [0] * len(lengths), list(range(len(lengths)))
    while rest:
        dealt = Blend([weights[source] for source in rest]).counts(samples - sum(counts))
        shared = dict(zip(rest, dealt, strict=True))
        full = [source for source in rest if shared[source] >= lengths[source]]
        for source in full or rest:
            counts[source] = min(shared[source], lengths[source])
        rest = [source for source in rest if full and source not in full]
    return counts


def spread_over(length: int, wanted: int) -> Int64Array:
    """``wanted`` of the numbers below ``length``, no more than those, in the order of their bits read
    backwards; int64 [wanted]."""
    bits = (length - 1).bit_length()
    numbers = np.arange(min(2 * wanted, 1 << bits))  # of any so many at least half are below
    backwards = np.zeros_like(numbers)
    for bit in range(bits):
        backwards |= (numbers >> bit & 1) << (bits - 1 - bit)
    return backwards[backwards < length][:wanted]


def _spread(weights: Sequence[float], lengths: Sequence[int], samples: int) -> tuple[Int64Array, Int64Array]:
    """Source and window of each sample; sources are mixed, so that any first samples are of all."""
    counts = shares(weights, lengths, samples)
    sources = np.repeat(np.arange(len(counts)), counts)
    windows = np.concatenate([spread_over(*each) for each in zip(lengths, counts, strict=True)])
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    order = np.argsort(places, kind="stable")
    return sources[order], windows[order]


def _first(weights: Sequence[float], lengths: Sequence[int], samples: int) -> tuple[Int64Array, Int64Array]:
    sources, windows = Blend(weights)(np.arange(samples))
    missing = windows >= np.array(lengths)[sources]
    end = int(np.argmax(missing)) if missing.any() else samples
    return sources[:end], windows[:end]
