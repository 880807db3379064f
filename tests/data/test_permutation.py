"""The computed order is a bijection for every size and key, and looks random."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.loader.order import EpochPermutations, _round_keys

INT64 = st.integers(-(2**63), 2**63 - 1)


def permuted(n: int, seed: int, epoch: int, positions: npt.ArrayLike, *key: int) -> npt.NDArray[np.int64]:
    """What comes at some positions of one epoch."""
    return EpochPermutations(n, seed, *key)(epoch * n + np.asarray(positions))


@settings(max_examples=80)
@given(n=st.integers(1, 3000), seed=INT64, epoch=st.integers(0, 10**6))
def test_bijection(n: int, seed: int, epoch: int) -> None:
    images = permuted(n, seed, epoch, np.arange(n))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(n))


def inverse(n: int, seed: int, epoch: int, image: int) -> int:
    """The position that an epoch sends to ``image``: the rounds of the network run backwards, in Python's
    integers, walking back through values outside [0, n)."""
    bits = max(6, (n - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    keys = [int(key) for key in _round_keys((seed, epoch))]
    value = image
    while True:
        high, low = value >> low_bits, value % 2**low_bits
        for number in reversed(range(len(keys))):
            if number % 2:
                high ^= mix(low ^ keys[number]) % 2**high_bits
            else:
                low ^= mix(high ^ keys[number]) % 2**low_bits
        value = high << low_bits | low
        if value < n:
            return value


@pytest.mark.slow
@settings(max_examples=150)
@given(bits=st.integers(0, 40), seed=INT64, epoch=st.integers(0, 10**6), data=st.data())
def test_bijection_of_every_size(bits: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """What has an inverse on a finite set is a bijection; sampled for n up to 2**40."""
    n = data.draw(st.integers(2**bits // 2 + 1, 2**bits))
    for position in data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)):
        image = int(permuted(n, seed, epoch, [position])[0])
        assert 0 <= image < n
        assert inverse(n, seed, epoch, image) == position


@pytest.mark.slow
@settings(max_examples=10)
@given(
    n=st.integers(1, 200),
    seed=INT64,
    key=st.sampled_from([(), (1,), (2**60, -1)]),
    start=st.integers(0, 10**12),
)
def test_epochs_in_one_go(n: int, seed: int, key: tuple[int, ...], start: int) -> None:
    numbers = np.arange(start, start + 40)
    expected = [int(permuted(n, seed, g // n, [g % n], *key)[0]) for g in numbers.tolist()]
    assert EpochPermutations(n, seed, *key)(numbers).tolist() == expected
    assert EpochPermutations(n, seed, *key)(numbers[:0]).tolist() == []


@settings(max_examples=30)
@given(n=st.integers(2**40, 2**62), start=st.integers(0, 2**40 - 1000))
def test_large_ranges_stay_inside_without_collision(n: int, start: int) -> None:
    images = permuted(n, 1, 1, np.arange(start, start + 1000))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == 1000


@given(n=st.integers(2, 500), data=st.data())
def test_slices_do_not_matter(n: int, data: st.DataObject) -> None:
    order = EpochPermutations(n, 5)
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    assert order(positions).tolist() == order(np.arange(n))[positions].tolist()


def test_keys_give_different_orders() -> None:
    names = [(0, 0), (0, 1), (1, 0), (0, 0, 0)]
    orders = [permuted(10_000, seed, epoch, np.arange(10_000), *key) for seed, epoch, *key in names]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 20  # 1 expected by chance


def test_looks_random() -> None:
    """Fixed points, neighbours and correlation of a random order of 65,537 things."""
    n = 65_537
    images = permuted(n, 3, 0, np.arange(n))
    assert (images == np.arange(n)).sum() < 10
    assert (np.abs(np.diff(images)) == 1).sum() < 15  # 2 expected
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.02
    counts = np.histogram(images[: n // 8], bins=64, range=(0, n))[0]  # 128 in each expected
    assert ((counts - 128) ** 2 / 128).sum() < 120  # chi squared, 63 degrees of freedom


def test_order_is_frozen() -> None:
    """A checkpoint stores a position in this order: changing it silently changes resumed runs."""
    assert permuted(1000, 1234, 7, np.arange(5)).tolist() == [487, 786, 59, 209, 248]


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_impossible_sizes(n: int) -> None:
    with pytest.raises(ValueError, match=f"Cannot permute {n} things"):
        EpochPermutations(n, 0)
