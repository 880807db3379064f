"""Windows and splits: exact contents, no cost at start-up, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.indexed import IndexedDataset
from megatron_iiet.data.samples import TokenWindows, build_splits

MakeShard = Callable[..., Path]


def test_windows(make_shard: MakeShard) -> None:
    splits = build_splits(make_shard([4, 3, 5, 1, 8]), 3, [0.6, 0.4, 0])
    assert [window.tolist() for window in splits.train] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [window.tolist() for window in splits.validation] == [[12, 13, 14, 15], [15, 16, 17, 18]]
    assert (len(splits.test), splits.train.num_tokens, splits.validation.num_tokens) == (0, 12, 9)
    window = splits.train[0]
    assert (window.dtype, window.shape) == (torch.int64, (4,))
    with pytest.raises(IndexError, match="window 3 of 3"):
        splits.train[3]
    with pytest.raises(IndexError):
        splits.test[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=10, max_size=60),
    length=st.integers(1, 12),
    shares=st.sampled_from([(1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3)]),
)
def test_splits_cover_the_documents(
    make_shard: MakeShard, lengths: list[int], length: int, shares: tuple[float, float, float]
) -> None:
    prefix = make_shard(lengths)
    try:
        splits = build_splits(prefix, length, shares)
    except ValueError as error:
        assert "too few for a window" in str(error)  # noqa: PT017
        return
    parts = [splits.train, splits.validation, splits.test]
    bounds = set(np.cumsum([0, *lengths]).tolist())
    assert [parts[0].start, parts[-1].stop] == [0, sum(lengths)]
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    for part, share in zip(parts, shares, strict=True):
        assert {part.start, part.stop} <= bounds
        assert (len(part) == 0) == (share == 0)
        if share:
            predicted = torch.cat([window[1:] for window in part])
            assert predicted.tolist() == list(range(part.start + 1, part.start + 1 + length * len(part)))
            assert 0 <= part.num_tokens - 1 - len(predicted) < length


@pytest.mark.parametrize(
    ("length", "split", "message"),
    [
        (3, [0.5, 0.4], r"data\.split is \[0\.5, 0\.4\]; give three shares"),
        (3, [0.5, 0.4, 0.2], "sum 1"),
        (3, [1.1, -0.1, 0.0], "none negative"),
        (3, [float("nan"), 0.5, 0.5], "give three shares"),
        (0, [1, 0, 0], r"data\.sequence_length is 0"),
        (
            5,
            [0.9, 0.1, 0],
            r"validation split of .* has 1 documents with 4 tokens, too few for a window of 6",
        ),
        (3, [0.99, 0.01, 0], r"validation split of .* has 0 documents with 0 tokens"),
        (40, [1, 0, 0], r"train split of .* has 10 documents with 40 tokens, too few for a window of 41"),
    ],
)
def test_refusals(make_shard: MakeShard, length: int, split: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_splits(make_shard([4] * 10), length, split)


def test_one_token_less_is_too_few(make_shard: MakeShard) -> None:
    shard = IndexedDataset(make_shard([11]))
    assert [len(TokenWindows(shard, 0, stop, 5)) for stop in (0, 1, 5, 6, 10, 11)] == [0, 0, 0, 1, 1, 2]
