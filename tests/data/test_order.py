"""The order over sources and epochs: what it was for one source, exact for many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.loader.blend import Blend
from megatron_iiet.data.loader.order import EpochPermutations, SampleOrder


@pytest.mark.slow
@settings(max_examples=15)
@given(n=st.integers(1, 90), seed=st.integers(0, 2**40), start=st.integers(0, 300))
def test_one_source_is_epoch_after_epoch_of_its_permutation(n: int, seed: int, start: int) -> None:
    sources, windows = SampleOrder([n], [2.5], seed)(np.arange(start, start + 200))
    assert not sources.any()
    assert windows.tolist() == EpochPermutations(n, seed)(np.arange(start, start + 200)).tolist()


def test_order_is_frozen() -> None:
    """A checkpoint stores a place in this order: changing it silently changes resumed runs."""
    assert SampleOrder([1000], [1.0], 1234)(np.arange(7000, 7005))[1].tolist() == [487, 786, 59, 209, 248]
    sources, windows = SampleOrder([1000, 50], [0.7, 0.3], 1234)(np.arange(500, 508))
    assert sources.tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert windows.tolist() == [473, 642, 15, 927, 159, 11, 922, 0]


@pytest.mark.slow
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_blended_sources_each_read_everything_once_an_epoch(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(lengths), max_size=len(lengths)))
    order = SampleOrder(lengths, weights, seed)
    sources, windows = order(np.arange(1500))
    assert np.array_equal(sources, Blend(weights)(np.arange(1500))[0])
    for source, n in enumerate(lengths):
        read = windows[sources == source]
        whole = read[: len(read) // n * n].reshape(-1, n)
        assert np.array_equal(np.sort(whole), np.tile(np.arange(n), (len(whole), 1)))
        assert order.epochs(1500)[source] == len(read) / n
    pieces = [order(part) for part in np.split(np.arange(1500), [1, 7, 800])]
    assert np.array_equal(np.concatenate([windows for _, windows in pieces]), windows)


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    sources, windows = SampleOrder([500, 500, 500], [1, 1, 1], 0)(np.arange(1500))
    orders = [windows[sources == source] for source in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # 1 expected by chance
    assert np.array_equal(orders[0], EpochPermutations(500, 0)(np.arange(500)))
    assert np.array_equal(orders[2], EpochPermutations(500, 0, 2)(np.arange(500)))


def test_far_out() -> None:
    """Sample numbers and sources as large as they may get."""
    order = SampleOrder([2**41 + 5, 3], [0.9, 0.1], 7)
    sources, windows = order(np.arange(10**15, 10**15 + 100))
    assert windows[sources == 0].max() > 2**35
    assert set(windows[sources == 1].tolist()) == {0, 1, 2}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="The training split has no windows"):
        SampleOrder([5, 0], [1, 1], 0)
    with pytest.raises(ValueError, match="A weight of the blend is -1"):
        SampleOrder([5, 1], [1, -1], 0)
