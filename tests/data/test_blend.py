"""The blend is exact at every prefix, and a function of the sample number alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.loader import blend
from megatron_iiet.data.loader.blend import BLOCK, Blend

DECIMALS = st.decimals(min_value="0.001", max_value=9, places=3).map(float)
SLIMPAJAMA = [0.522, 0.267, 0.0522, 0.042, 0.033, 0.05, 0.0338]


def deviations(weights: list[float], samples: int) -> tuple[int, int]:
    """Largest excess and lack of any source in any prefix of the first samples, times the exact sum of the
    weights, rounded up; and that sum. Everything in exact integers."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = int(np.lcm.reduce([weight.denominator for weight in exact]))
    parts = [int(weight * scale) for weight in exact]
    sources, ranks = Blend(weights)(np.arange(samples))
    worst = 0
    for source, part in enumerate(parts):
        own = sources == source
        assert np.array_equal(ranks[own], np.arange(own.sum()))
        off = np.cumsum(own) * sum(parts) - np.arange(1, samples + 1) * part
        worst = max(worst, int(np.abs(off).max()))
    return worst, sum(parts)


@pytest.mark.slow
@settings(max_examples=60)
@given(weights=st.lists(DECIMALS, min_size=1, max_size=8))
def test_less_than_one_sample_from_the_weights_in_every_prefix(weights: list[float]) -> None:
    period = sum(round(weight * 1000) for weight in weights)
    worst, one = deviations(weights, min(period, 20_000) + 1000)
    assert worst < one


def test_every_small_proportion() -> None:
    """All weights of up to four sources that sum to at most 16."""
    for total in range(2, 17):
        for cuts in (c for k in range(1, 4) for c in combinations(range(1, total), k)):
            weights = [b - a for a, b in pairwise((0, *cuts, total))]
            worst, one = deviations(weights, total)
            assert worst < one, weights


@pytest.mark.slow
@settings(max_examples=60)
@given(weights=st.lists(st.integers(10**7, 10**8), min_size=2, max_size=8), length=st.integers(80, 200))
def test_weights_without_a_small_common_denominator(weights: list[int], length: int) -> None:
    """Less than one sample at the borders of blocks, less than two in between, and no drift."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "BLOCK", length)
        dealer = Blend(weights)
        worst, one = deviations(weights, 40 * length)
        assert worst < 2 * one
        for block in (0, 1, 17, 40, 10**15):
            counts = dealer.counts(block * length)
            assert sum(counts) == block * length
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count * sum(weights) - block * length * weight) < sum(weights)
        for before, after in pairwise(dealer.counts(n) for n in range(3 * length)):
            assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(weights) - 1) + [1]


def test_token_counts_as_weights() -> None:
    """The same with blocks of the real size."""
    weights = [522_123_007, 267_001_311, 52_211_900, 42_000_043, 33_003_001, 50_021_777, 33_801_013]
    worst, one = deviations(weights, BLOCK + 5000)
    assert one < worst < 2 * one  # the bound of one is lost indeed
    counts = Blend(weights).counts(10**12)
    assert sum(counts) == 10**12
    assert all(abs(c - 10**12 * w / sum(weights)) < 1.001 for c, w in zip(counts, weights, strict=True))


@given(weights=st.lists(DECIMALS, min_size=1, max_size=5), data=st.data())
@settings(max_examples=60)
def test_any_run_of_samples_is_less_than_two_from_its_share(
    weights: list[float], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, 10**12))
    dealer = Blend(weights)
    sources, ranks = dealer(np.arange(start, start + 500))
    before = dealer.counts(start)
    for source, share in enumerate(dealer.shares):
        own = sources == source
        assert ranks[own].tolist() == list(range(before[source], before[source] + int(own.sum())))
        assert np.abs(np.cumsum(own) - np.arange(1, 501) * share).max() < 2


@pytest.mark.slow
@given(
    samples=st.lists(st.integers(0, 10**13), min_size=1, max_size=30),
    weights=st.sampled_from([SLIMPAJAMA, [1, 1], [3], [0.1, 0.2, 0.70001], [123_456_789, 987_654_321]]),
)
@settings(max_examples=40)
def test_one_by_one_or_together_in_any_order(samples: list[int], weights: list[float]) -> None:
    dealer = Blend(weights)
    sources, ranks = dealer(np.array(samples))
    assert (sources.dtype, ranks.dtype) == (np.int64, np.int64)
    for sample, source, rank in zip(samples, sources, ranks, strict=True):
        assert [int(one[0]) for one in Blend(weights)([sample])] == [source, rank]
        after = dealer.counts(sample + 1)
        before = dealer.counts(sample)
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            int(i == source) for i in range(len(weights))
        ]
        assert before[source] == rank


def test_scale_does_not_matter() -> None:
    numbers = np.arange(5000)
    for one, other in (([0.5, 0.3, 0.2], [5, 3, 2]), ([0.1, 0.1], [7.0, 7.0]), ([2], [0.3])):
        assert all(
            np.array_equal(a, b) for a, b in zip(Blend(one)(numbers), Blend(other)(numbers), strict=True)
        )
    assert Blend([1, 3]).shares == [0.25, 0.75]


def test_order_is_frozen() -> None:
    """A checkpoint stores a place in this order: changing it silently changes resumed runs."""
    assert Blend([0.5, 0.3, 0.2])(np.arange(10))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert Blend([1, 2, 5])(np.arange(8))[0].tolist() == [2, 1, 2, 2, 2, 0, 1, 2]
    assert Blend([522_123_007, 267_001_311, 52_211_900]).counts(10**12 + 12345) == [
        620587824790,
        317353881342,
        62058306213,
    ]
    sources, ranks = Blend([123_456_789, 987_654_321])([999_999, 1_000_000, 10**12])
    assert (sources.tolist(), ranks.tolist()) == ([1, 1, 1], [888888, 888889, 888888889789])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "The blend has no weights"),
        ([1, 0], "A weight of the blend is 0; weights must be finite and greater than 0"),
        ([1, -0.5], "A weight of the blend is -0.5"),
        ([1, float("nan")], "A weight of the blend is nan"),
        ([1, float("inf")], "A weight of the blend is inf"),
        ([0.5, 1e-6], f"The weight 1e-06 of the blend is less than 1/{BLOCK} of the sum 0.500001; raise it"),
    ],
)
def test_refusals(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blend(weights)


def test_the_smallest_weight() -> None:
    """One slot a block is dealt; a little less, whose count could go below zero, is refused."""
    assert Blend([BLOCK - 1, 1]).counts(3 * BLOCK) == [3 * BLOCK - 3, 3]
    with pytest.raises(ValueError, match="less than"):
        Blend([BLOCK, 1])
