"""Packing: every token once, documents never joined, best fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.loader.packing import Packing, cut, operator, pack, pack_documents
from tests.ops.inputs import needs_extension


def bins_of(packing: Packing) -> list[list[tuple[int, int]]]:
    """(start, length) of the pieces in each bin."""
    pieces = list(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(packing.bounds, packing.bounds[1:], strict=False)]


def packed(lengths: list[int], bins: int, capacity: int) -> list[list[tuple[int, int]]]:
    sizes = np.array(lengths, dtype=np.int64)
    return bins_of(pack(np.cumsum(sizes) - sizes, sizes, bins, capacity))


@settings(max_examples=100)
@given(data=st.data(), start=st.integers(0, 2**40), size=st.integers(1, 300), capacity=st.integers(1, 30))
def test_pieces_end_where_documents_do(data: st.DataObject, start: int, size: int, capacity: int) -> None:
    inside = st.integers(start, start + size - 1)
    documents = np.array(sorted(data.draw(st.sets(inside, max_size=30))), dtype=np.int64)
    starts, lengths = cut(documents, start, start + size, capacity)
    stops = starts + lengths
    assert starts[0] == start
    assert stops[-1] == start + size
    assert np.array_equal(starts[1:], stops[:-1])
    assert lengths.min() >= 1
    assert lengths.max() <= capacity
    assert set(documents.tolist()) <= set(starts.tolist())
    # What is no start of a document goes on with one, after a full piece.
    for piece in range(1, len(starts)):
        assert starts[piece] in documents or lengths[piece - 1] == capacity


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data(), capacity=st.integers(1, 40), spare=st.integers(0, 3))
def test_every_token_has_one_place(data: st.DataObject, capacity: int, spare: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=40))
    bins = -(-sum(lengths) // capacity) + spare
    result = packed(lengths, bins, capacity)
    assert len(result) == bins
    assert all(sum(length for _, length in pieces) <= capacity for pieces in result)
    tokens = [t for pieces in result for start, length in pieces for t in range(start, start + length)]
    assert sorted(tokens) == list(range(sum(lengths)))
    bounds = set(np.cumsum(lengths).tolist())  # no piece crosses one
    assert not any(
        bounds & set(range(start + 1, start + length)) for pieces in result for start, length in pieces
    )


@settings(max_examples=100)
@given(data=st.data(), capacity=st.integers(2, 30))
def test_nothing_is_cut_where_a_bin_has_room(data: st.DataObject, capacity: int) -> None:
    """With a bin for each piece none is cut, and none is opened while the piece fits another."""
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=30))
    result = packed(lengths, len(lengths), capacity)
    assert sorted(length for pieces in result for _, length in pieces) == sorted(lengths)
    # All bins but the last one opened lack room for the longest piece.
    assert sum(map(bool, result)) <= -(-sum(lengths) // (capacity - max(lengths) + 1))


def test_best_fit() -> None:
    """By hand: 7 leaves 3, 6 leaves 4; 4 and 3 go where they just fit, 2 and 1 into the next bin."""
    assert packed([2, 6, 4, 7, 3, 1], 4, 10) == [[(12, 7), (19, 3)], [(2, 6), (8, 4)], [(0, 2), (22, 1)], []]


def test_a_piece_that_fits_nowhere_fills_the_gaps() -> None:
    assert packed([6, 6, 6], 2, 9) == [[(0, 6), (15, 3)], [(6, 6), (12, 3)]]
    assert packed([5, 7, 6], 2, 9) == [[(5, 7), (3, 2)], [(12, 6), (0, 3)]]


def test_deterministic() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 200).tolist()
    assert packed(lengths, 110, 100) == packed(lengths, 110, 100)


@pytest.mark.parametrize(("mean", "most"), [(300, 0), (1000, 0), (3000, 2)])
def test_usual_mixtures_of_lengths_are_hardly_cut(mean: int, most: int) -> None:
    """What :class:`PackedSamples` promises: 64 samples' worth of text of mixed lengths in 65 samples."""
    rng, capacity, cuts = np.random.default_rng(mean), 2049, []
    for _ in range(20):
        lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.72, 1.2, 3000)).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        stop = 64 * capacity
        pieces = cut(starts[starts < stop], 0, stop, capacity)
        cuts.append(len(pack(*pieces, 65, capacity).starts) - len(pieces[0]))
    assert sum(cuts) <= most * len(cuts)


@needs_extension
@pytest.mark.parametrize("mean", [1, 3, 30, 300, 3000])
def test_the_extension_packs_alike(mean: int) -> None:
    """Bit for bit, whatever the lengths: runs resume by them."""
    assert operator() is not None, "the extension was built before it could pack: build it again"
    rng = np.random.default_rng(mean)
    for _ in range(200):
        capacity, size = int(rng.integers(1, 300)), int(rng.integers(1, 5000))
        start = int(rng.integers(0, 2**40))
        documents = start - int(rng.integers(0, 9)) + np.cumsum(1 + rng.geometric(1 / mean, size) // 2)
        documents = documents[(documents >= start) & (documents < start + size)]
        bins = -(-size // capacity) + int(rng.integers(0, 3))
        native = pack_documents(documents, start, start + size, bins, capacity)
        expected = pack(*cut(documents, start, start + size, capacity), bins, capacity)
        for field, found, wanted in zip(Packing._fields, native, expected, strict=True):
            assert found.dtype == wanted.dtype
            assert np.array_equal(found, wanted), field


@needs_extension
@pytest.mark.parametrize(
    ("documents", "bins", "said"),
    [
        ([7, 5], 9, r"documents\[1\] starts at 5, expected from 8 to below 20"),
        ([7, 7], 9, r"documents\[1\] starts at 7"),
        ([3], 9, r"documents\[0\] starts at 3, expected from 4"),
        ([20], 9, r"documents\[0\] starts at 20"),
        ([], 3, r"the tokens \[4, 20\) do not fill or do not fit 3 bins of 5"),
    ],
)
def test_what_the_extension_refuses(documents: list[int], bins: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_documents(np.array(documents, dtype=np.int64), 4, 20, bins, 5)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with one that was built before it had the operator."""
    monkeypatch.setattr("megatron_iiet.data.loader.packing.operator", lambda: None)
    documents = np.array([2, 8, 12, 19, 22])
    assert bins_of(pack_documents(documents, 0, 23, 4, 10)) == packed([2, 6, 4, 7, 3, 1], 4, 10)
