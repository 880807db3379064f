"""A pseudo-random order of n things that is computed, not stored.

A balanced-as-possible Feistel network permutes [0, 2**bits), the smallest such range holding n; values that
fall outside [0, n) are sent through again until they fall inside ("cycle walking": Black and Rogaway 2002).
Fewer than half of the values walk at any round, so the expected cost is under two passes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MIN_BITS = 6  # below that a Feistel network has too few distinct keys to mix well; walking is cheap there


class Permutation:
    """The bijection of [0, n) named by (seed, epoch).

    Args:
        n: number of things, 1 to 2**62.
        seed, epoch: the key; any integers of 64 bits.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"Cannot permute {n} things; between 1 and 2**62 are possible.")
        self.n = n
        bits = max(_MIN_BITS, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        key = struct.pack("<qq", seed, epoch)
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS, person=b"sample-order").digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Images of ``positions``, int [...] in [0, n), as int64 [...]."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} leave [0, {self.n})")
        values = self._network(wanted.ravel().astype(np.uint64))
        while (outside := np.flatnonzero(values >= np.uint64(self.n))).size:
            values[outside] = self._network(values[outside])
        return values.astype(np.int64).reshape(wanted.shape)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One pass of the network over uint64 [count] in [0, 2**bits)."""
        high, low = values >> self._low_bits, values & self._low_mask
        for round_number, key in enumerate(self._round_keys):
            # A half changes by a function of the other alone: doing it again undoes it, so a bijection.
            if round_number % 2:
                high = high ^ (_mix(low ^ key) & self._high_mask)
            else:
                low = low ^ (_mix(high ^ key) & self._low_mask)
        mixed: npt.NDArray[Any] = (high << self._low_bits) | low
        return mixed


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
