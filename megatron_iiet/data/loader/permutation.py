"""A pseudo-random order of n things that is computed, not stored.

A balanced-as-possible Feistel network permutes [0, 2**bits), the smallest such range holding n; values that
fall outside [0, n) are sent through again until they fall inside ("cycle walking": Black and Rogaway 2002).
Fewer than half of the values walk at any round, so the expected cost is under two passes.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

_Keys = npt.NDArray[np.uint64]
_ROUNDS = 8
_MIN_BITS = 6  # below that a Feistel network has too few distinct keys to mix well; walking is cheap there


class Permutation:
    """The bijection of [0, n) named by a key.

    Args:
        n: number of things, 1 to 2**62.
        key: any integers of 64 bits.
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._network = _Network(n)
        self._round_keys = _round_keys(key)[:, None]

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Images of ``positions``, int [...] in [0, n), as int64 [...]."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} leave [0, {self.n})")
        return self._network(wanted.ravel(), self._round_keys).reshape(wanted.shape)


class EpochPermutations:
    """Epoch after epoch of n things, each in the order of ``Permutation(n, seed, epoch, *key)``.

    Args:
        n: number of things, 1 to 2**62.
        seed, key: any integers of 64 bits.
    """

    def __init__(self, n: int, seed: int, *key: int) -> None:
        self.n = n
        self._network = _Network(n)
        self._seed, self._key = seed, key

    def __call__(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The thing that comes at each of ``numbers``, counted from 0 over all epochs; int64 [m] -> [m]."""
        epochs, positions = np.divmod(numbers, self.n)
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = [_round_keys((self._seed, epoch, *self._key)) for epoch in distinct.tolist()]
        if len(keys) == 1:
            return self._network(positions, keys[0][:, None])
        return self._network(positions, np.stack(keys, axis=1)[:, which]) if keys else positions


class _Network:
    """The Feistel network of [0, n) under given keys."""

    def __init__(self, n: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"Cannot permute {n} things; between 1 and 2**62 are possible.")
        bits = max(_MIN_BITS, (n - 1).bit_length())
        self._n = np.uint64(n)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def __call__(self, positions: npt.NDArray[np.int64], keys: _Keys) -> npt.NDArray[np.int64]:
        """Images of int64 [m] in [0, n); ``keys``: uint64 [rounds, m], or [rounds, 1] for all."""
        values = self._pass(positions.astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            again = self._pass(values[outside], keys if keys.shape[1] == 1 else keys[:, outside])
            values[outside] = again
            outside = outside[again >= self._n]
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
