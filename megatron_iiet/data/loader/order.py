"""The order of training samples over all sources and epochs, a function of the sample's number.

A sample number picks the source (:class:`~.blend.Blend`) and is the g-th sample taken from
it; with n windows there, that is position g mod n of epoch g div n, whose order is a
:class:`~.permutation.Permutation` named by (seed, epoch), and for sources after the first
by (seed, epoch, number of the source).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.loader.blend import Blend
from megatron_iiet.data.loader.permutation import EpochPermutations

Int64Array = npt.NDArray[np.int64]


class SampleOrder:
    """Sample numbers -> sources and windows.

    Args:
        lengths: windows of each source.
        weights: of the sources, see :class:`~.blend.Blend`.
        seed: names the order.

    Raises:
        ValueError: a source has no windows, or the weights cannot be blended.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if min(lengths) < 1:
            raise ValueError("The training split has no windows; use more text or a shorter sequence_length.")
        self.blend = Blend(weights)
        self._epochs = [
            # The key of the first source has no number: one source alone keeps the order it always had.
            EpochPermutations(n, seed, *((source,) if source else ()))
            for source, n in enumerate(lengths)
        ]

    def __call__(self, samples: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Source and window of each of the samples, int [n]; both int64 [n]."""
        sources, taken = self.blend(samples)
        if len(self._epochs) == 1:
            return sources, self._epochs[0](taken)
        windows = np.empty_like(taken)
        for source in np.unique(sources).tolist():
            own = sources == source
            windows[own] = self._epochs[source](taken[own])
        return sources, windows

    def epochs(self, samples: int) -> list[float]:
        """How many times each source has been read after ``samples`` samples."""
        counts = self.blend.counts(samples)
        return [count / source.n for count, source in zip(counts, self._epochs, strict=True)]
