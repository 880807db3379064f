"""What validation reads: windows by a rule, each once, whatever the ranks; no small source ends the set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_iiet.data.loader.samples import TokenWindows, build_splits
from megatron_iiet.data.loader.validation import RULES, ValidationBatches, shares, spread_over
from tests.data.test_batches import VOCABULARY, Stream, T, numbered, written

OPTIONS: dict[str, Any] = {"micro_batch_size": 4, "dp_rank": 0, "dp_size": 1}


@given(
    n=st.integers(1, 40),
    samples=st.integers(1, 50),
    micro=st.integers(1, 5),
    ranks=st.integers(1, 4),
    rule=st.sampled_from(list(RULES)),
)
def test_every_sample_once_on_equal_ranks(n: int, samples: int, micro: int, ranks: int, rule: str) -> None:
    readers = [
        ValidationBatches(
            [numbered(n)], samples=samples, micro_batch_size=micro, dp_rank=rank, dp_size=ranks, rule=rule
        )
        for rank in range(ranks)
    ]
    assert len({len(reader) for reader in readers}) == 1
    seen = []
    for reader in readers:
        found = list(reader)
        assert len(found) == len(reader)
        for tokens, weights, positions in found:
            assert (tokens.shape, weights.shape, positions) == ((micro, 3), (micro,), None)
            seen += (tokens[weights == 1, 0] // T).tolist()
            assert set(weights.tolist()) <= {0.0, 1.0}
    wanted = spread_over(n, min(n, samples)) if rule == "spread" else np.arange(min(n, samples))
    assert sorted(seen) == sorted(wanted.tolist())
    assert readers[0].samples == min(n, samples)


@given(length=st.integers(1, 10**13), more=st.integers(1, 300), fewer=st.integers(0, 300))
def test_windows_lie_over_the_whole_split(length: int, more: int, fewer: int) -> None:
    """Each once; any part of the split has its share but for the logarithm of their number; sets nest."""
    windows = spread_over(length, min(more, length))
    assert len(set(windows.tolist())) == len(windows) == min(more, length)
    assert windows.min() >= 0
    assert windows.max() < length
    assert spread_over(length, min(fewer, len(windows))).tolist() == windows[:fewer].tolist()
    for part in np.linspace(0, length, 8)[1:].tolist():
        share = len(windows) * part / length
        assert abs(np.count_nonzero(windows < part) - share) <= 1 + np.log2(len(windows) + 1)


def test_the_rule_is_frozen() -> None:
    assert RULES == {"first": 0, "spread": 1}
    assert spread_over(11, 6).tolist() == [0, 8, 4, 2, 10, 6]
    assert spread_over(1, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("weights", "lengths", "samples", "counts"),
    [
        ([1, 1], [1000, 9], 256, [247, 9]),
        ([3, 1, 1], [100, 4, 100], 50, [35, 4, 11]),
        ([1, 1, 1], [5, 3, 100], 90, [5, 3, 82]),
        ([3, 1], [5, 4], 100, [5, 4]),
        ([1, 1], [10, 10], 1, [1, 0]),
        ([0.7, 0.2, 0.1], [50, 50, 50], 20, [14, 4, 2]),
    ],
)
def test_what_a_source_lacks_comes_from_the_others(
    weights: list[float], lengths: list[int], samples: int, counts: list[int]
) -> None:
    assert shares(weights, lengths, samples) == counts
    sources = [numbered(length) for length in lengths]
    reader = ValidationBatches(sources, weights, samples=samples, **OPTIONS)
    assert (reader.counts, reader.samples) == (counts, sum(counts))


def starts(reader: ValidationBatches) -> list[int]:
    return [token for batch in reader for token in batch.tokens[:, 0].tolist()]


def test_blended() -> None:
    """Any first samples are of all sources; by the first rule, until one of them ends."""
    sources = [numbered(30), TokenWindows(Stream(2000), 1000, 1011, T)]
    spread = ValidationBatches(sources, [0.75, 0.25], samples=12, **OPTIONS)
    assert starts(spread) == [0, 32, 1000, 16, 48, 8, 1008, 40, 24, 56, 1004, 4]
    first = ValidationBatches(sources, [0.75, 0.25], samples=12, rule="first", **OPTIONS)
    assert starts(first) == [0, 2, 4, 1000, 6, 8, 10, 1002, 12, 14, 16, 1004]
    assert ValidationBatches(sources, [0.75, 0.25], samples=100, rule="first", **OPTIONS).samples == 23


def test_the_same_every_time() -> None:
    reader = ValidationBatches([numbered(9)], samples=5, micro_batch_size=2, dp_rank=0, dp_size=1)
    once, again = list(reader), list(reader)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(once, again, strict=True))
    assert (once[0].tokens.dtype, once[0].weights.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("documents", ["reset", "pack"])
def test_positions(documents: str, tmp_path: Path) -> None:
    prefix = written(tmp_path, "c", np.random.default_rng(0).integers(1, 40, 90).tolist(), 0)
    source = build_splits(prefix, 11, [0.5, 0.5, 0], documents, vocab_size=VOCABULARY).validation
    (batch,) = ValidationBatches([source], samples=5, micro_batch_size=6, dp_rank=0, dp_size=1)
    assert batch.positions is not None
    read = spread_over(len(source), 5).tolist()
    for row, index in enumerate([*read, read[0]]):
        tokens, positions = np.empty((2, 12), dtype=np.int64)
        source.fill(index, tokens, positions)
        assert batch.tokens[row].tolist() == tokens.tolist()
        assert batch.positions[row].tolist() == positions.tolist()


@pytest.mark.parametrize(("n", "samples"), [(0, 5), (5, 0)])
def test_nothing_to_read(n: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"Nothing to validate on: {samples} samples wanted"):
        ValidationBatches([numbered(n)], samples=samples, **OPTIONS)


def test_a_rule_of_a_later_version() -> None:
    with pytest.raises(ValueError, match="windows of the rule 'wide', which this version does not know"):
        ValidationBatches([numbered(5)], samples=2, rule="wide", **OPTIONS)
