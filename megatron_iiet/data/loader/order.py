"""The order of training samples over all sources and epochs, a function of the sample's number.

A sample number picks the source (:class:`~.blend.Blend`) and is the g-th sample taken from it; with n windows
there, that is position g mod n of epoch g div n, whose pseudo-random order is named by (seed, epoch), and for
sources after the first by (seed, epoch, number of the source). Orders are computed, not stored.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.data.loader.blend import Blend

_Keys = npt.NDArray[np.uint64]
_ROUNDS = 8
_MIN_BITS = 6  # below that a Feistel network has too few distinct keys to mix well; walking is cheap there


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
        windows = np.empty_like(taken)
        for source in np.unique(sources).tolist():
            own = sources == source
            windows[own] = self._epochs[source](taken[own])
        return sources, windows

    def epochs(self, samples: int) -> list[float]:
        """How many times each source has been read after ``samples`` samples."""
        counts = self.blend.counts(samples)
        return [count / source.n for count, source in zip(counts, self._epochs, strict=True)]


class EpochPermutations:
    """Epoch after epoch of n things, each in an order of its own, named by (seed, epoch, *key).

    A balanced-as-possible Feistel network permutes [0, 2**bits), the smallest such range holding n; values
    that fall outside [0, n) are sent through again until they fall inside ("cycle walking": Black and Rogaway
    2002). Fewer than half of the values walk at any round, so the expected cost is under two passes.

    Args:
        n: number of things, 1 to 2**62.
        seed, key: any integers of 64 bits.
    """

    def __init__(self, n: int, seed: int, *key: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"Cannot permute {n} things; between 1 and 2**62 are possible.")
        self.n = n
        self._seed, self._key = seed, key
        bits = max(_MIN_BITS, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def __call__(self, numbers: Int64Array) -> Int64Array:
        """The thing that comes at each of ``numbers``, counted from 0 over all epochs; int64 [m] -> [m]."""
        epochs, positions = np.divmod(numbers, self.n)
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = [_round_keys((self._seed, epoch, *self._key)) for epoch in distinct.tolist()]
        if len(keys) == 1:
            return self._permute(positions, keys[0][:, None])
        return self._permute(positions, np.stack(keys, axis=1)[:, which]) if keys else positions

    def _permute(self, positions: Int64Array, keys: _Keys) -> Int64Array:
        """Images of int64 [m] in [0, n); ``keys``: uint64 [rounds, m], or [rounds, 1] for all."""
        values = self._pass(positions.astype(np.uint64), keys)
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while outside.size:
            again = self._pass(values[outside], keys if keys.shape[1] == 1 else keys[:, outside])
            values[outside] = again
            outside = outside[again >= np.uint64(self.n)]
        return values.astype(np.int64)

    def _pass(self, values: npt.NDArray[np.uint64], keys: _Keys) -> npt.NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for number, key in enumerate(keys):
            # A half changes by a function of the other alone: doing it again undoes it, so a bijection.
            if number % 2:
                high ^= _mix(low ^ key) & self._high_mask
            else:
                low ^= _mix(high ^ key) & self._low_mask
        return (high << self._low_bits) | low


def _round_keys(key: tuple[int, ...]) -> _Keys:
    packed = struct.pack(f"<{len(key)}q", *key)
    digest = hashlib.blake2b(packed, digest_size=8 * _ROUNDS, person=b"sample-order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit.

    Overwrites ``x``."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
