"""Samples and splits: exact contents in every mode, no cost at start-up, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.streams import IndexedDataset
from megatron_iiet.data.loader.samples import (
    KINDS,
    DocumentWindows,
    PackedSamples,
    Samples,
    TokenWindows,
    UnknownTokenError,
    build_splits,
)

VOCABULARY = 2**31
"""Of a model that knows every id."""
MakeShard = Callable[..., Path]
SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(samples: Samples, index: int) -> tuple[list[int], list[int] | None]:
    """Tokens and positions of a sample, written into rows full of rubbish."""
    tokens, positions = np.full((2, samples.sequence_length + 1), -7)
    if not samples.has_positions:
        samples.fill(index, tokens, None)
        return tokens.tolist(), None
    samples.fill(index, tokens, positions)
    return tokens.tolist(), positions.tolist()


def test_windows(make_shard: MakeShard) -> None:
    splits = build_splits(make_shard([4, 3, 5, 1, 8]), 3, [0.6, 0.4, 0], vocab_size=VOCABULARY)
    train, validation = splits.train, splits.validation
    assert [read(train, i)[0] for i in range(3)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [read(validation, i)[0] for i in range(2)] == [[12, 13, 14, 15], [15, 16, 17, 18]]
    assert (len(train), len(validation), len(splits.test)) == (3, 2, 0)
    assert (train.num_tokens, validation.num_tokens, train.has_positions) == (12, 9, False)
    assert train.counted(np.array([0, 2])) == 6


@pytest.mark.parametrize("documents", KINDS)
def test_numbers_outside(make_shard: MakeShard, documents: str) -> None:
    splits = build_splits(make_shard([4, 3, 5, 1, 8]), 3, [0.6, 0.4, 0], documents, vocab_size=VOCABULARY)
    for samples, index in ((splits.train, -1), (splits.train, len(splits.train)), (splits.test, 0)):
        with pytest.raises(IndexError, match=f"sample {index} of {len(samples)}"):
            read(samples, index)


def test_windows_of_documents(make_shard: MakeShard) -> None:
    """Documents start at 0, 4, 7, 12, 13."""
    train = build_splits(make_shard([4, 3, 5, 1, 8]), 4, [1, 0, 0], "reset", vocab_size=VOCABULARY).train
    assert [read(train, i) for i in range(5)] == [
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 0]),
        ([4, 5, 6, 7, 8], [0, 1, 2, 0, 1]),
        ([8, 9, 10, 11, 12], [0, 1, 2, 3, 0]),
        ([12, 13, 14, 15, 16], [0, 0, 1, 2, 3]),
        ([16, 17, 18, 19, 20], [0, 1, 2, 3, 4]),
    ]
    assert [train.counted(np.array([i])) for i in range(5)] == [3, 3, 3, 3, 4]
    assert train.counted(np.array([4, 3, 4])) == 11
    assert train.counted(np.array([], dtype=np.int64)) == 0


def test_packed_samples(make_shard: MakeShard) -> None:
    """By hand: one block, pieces of at most 6 tokens; 8 is cut to 6 and 2, the rest is packed best-fit."""
    train = build_splits(make_shard([4, 3, 5, 1, 8]), 5, [1, 0, 0], "pack", vocab_size=VOCABULARY).train
    assert len(train) == 4
    assert [read(train, i) for i in range(4)] == [
        ([13, 14, 15, 16, 17, 18], [0, 1, 2, 3, 4, 5]),
        ([7, 8, 9, 10, 11, 12], [0, 1, 2, 3, 4, 0]),
        ([0, 1, 2, 3, 19, 20], [0, 1, 2, 3, 0, 1]),
        ([4, 5, 6, 0, 0, 0], [0, 1, 2, 0, 0, 0]),
    ]
    assert train.counted(np.arange(4)) == 5 + 4 + 4 + 2


@SHARED
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    length=st.integers(1, 12),
    block=st.integers(1, 5),
)
def test_packed_samples_hold_every_token_once(
    make_shard: MakeShard, lengths: list[int], length: int, block: int
) -> None:
    """Whatever the lengths: no token is lost or read twice, and every sequence is a part of a document."""
    bounds = np.cumsum([1, *lengths])  # token 0 is a document before the split, so that 0 is padding
    start, stop = 1, int(bounds[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSamples, "block", block)
        patch.setattr(PackedSamples, "samples_per_block", block + 1)
        samples = PackedSamples(IndexedDataset(make_shard([1, *lengths])), start, stop, length)
        rows = [read(samples, i) for i in range(len(samples))]
        assert [samples.counted(np.array([i])) for i in range(len(samples))] == [
            sum(position > 0 for position in positions or []) for _, positions in rows
        ]
    seen = []
    for tokens, positions in rows:
        assert positions is not None
        used = np.count_nonzero(tokens)
        assert not any(tokens[used:] + positions[used:])  # padding is at the end
        assert positions[0] == 0
        for i in range(1, used):
            assert positions[i] in (0, positions[i - 1] + 1)
            if positions[i]:
                assert tokens[i] == tokens[i - 1] + 1
                assert tokens[i] not in bounds
        seen += tokens[:used]
    lost = (stop - start) % (block * (length + 1)) == 1  # a last block of one token
    assert sorted(seen) == list(range(start, stop - lost))


def test_packing_in_blocks(make_shard: MakeShard) -> None:
    """64 samples' worth of tokens in 65 samples, block after block; the last block has its share."""
    shard = IndexedDataset(make_shard([7, 11, 2, 5] * 400))
    for tokens, expected in ((64 * 10, 65), (64 * 10 * 3, 195), (64 * 10 * 3 + 100, 206), (10, 2), (1, 0)):
        assert len(PackedSamples(shard, 0, tokens, 9)) == expected
    samples = PackedSamples(shard, 0, 64 * 10 * 3, 9)
    seen = {tokens[0] // 640 for tokens, _ in (read(samples, i) for i in range(65, 130)) if any(tokens)}
    assert seen == {1}


@SHARED
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
        splits = build_splits(prefix, length, shares, vocab_size=VOCABULARY)
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
            predicted = [token for i in range(len(part)) for token in read(part, i)[0][1:]]
            assert predicted == list(range(part.start + 1, part.start + 1 + length * len(part)))
            assert 0 <= part.num_tokens - 1 - len(predicted) < length


@pytest.mark.parametrize("documents", KINDS)
def test_kinds(make_shard: MakeShard, documents: str) -> None:
    """Every kind reads the same documents; only positions and places differ."""
    splits = build_splits(make_shard([9] * 40), 8, [0.75, 0.25, 0], documents, vocab_size=VOCABULARY)
    for part, first, last in ((splits.train, 0, 270), (splits.validation, 270, 360)):
        assert (part.start, part.stop, part.sequence_length) == (first, last, 8)
        assert (
            type(part) is {"ignore": TokenWindows, "reset": DocumentWindows, "pack": PackedSamples}[documents]
        )
        tokens = {token for i in range(len(part)) for token in read(part, i)[0] if token}
        assert (min(tokens), max(tokens)) == (
            max(first, 1),
            first + 8 * len(part) if documents != "pack" else last - 1,
        )


@pytest.mark.parametrize(
    ("length", "split", "message"),
    [
        (3, [0.5, 0.4], r"data\.split is \[0\.5, 0\.4\]; give three shares"),
        (3, [0.5, 0.4, 0.2], "sum 1"),
        (3, [0.5, 0.3, 0.1], "sum 1"),
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
        build_splits(make_shard([4] * 10), length, split, vocab_size=VOCABULARY)


def test_one_token_less_is_too_few(make_shard: MakeShard) -> None:
    shard = IndexedDataset(make_shard([11]))
    assert [len(TokenWindows(shard, 0, stop, 5)) for stop in (0, 1, 5, 6, 10, 11)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("documents", list(KINDS))
def test_an_id_that_the_model_does_not_know_is_named(make_shard: MakeShard, documents: str) -> None:
    """Token 17 of the stream has the id 17: the fifth (number 4) of document 2."""
    prefix = make_shard([4, 9, 30])
    train = build_splits(prefix, 3, [1, 0, 0], documents, vocab_size=17).train
    message = (
        r"holds the id 17 \(document 2, its token 4\), but model.vocab_size is 17; give the corpus that was "
        "made with this model's tokenizer, or raise model.vocab_size"
    )
    with pytest.raises(UnknownTokenError, match=message):
        _ = [read(train, index) for index in range(len(train))]
    known = build_splits(prefix, 3, [1, 0, 0], documents, vocab_size=43).train
    assert max(max(read(known, index)[0]) for index in range(len(known))) == 42


@pytest.mark.parametrize("documents", list(KINDS))
def test_the_first_id_behind_the_vocabulary_is_refused(make_shard: MakeShard, documents: str) -> None:
    """Where no larger one is beside it."""
    train = build_splits(make_shard([18]), 17, [1, 0, 0], documents, vocab_size=17).train
    with pytest.raises(UnknownTokenError, match=r"holds the id 17 \(document 0, its token 17\)"):
        read(train, 0)


def test_a_negative_id_is_named(tmp_path: Path) -> None:
    """Megatron's int32 pairs can hold one."""
    with IndexedDatasetWriter(tmp_path / "pair", 100_000) as writer:
        writer.add_document(np.arange(8))
    raw = np.fromfile(tmp_path / "pair.bin", np.int32)
    raw[5] = -2
    raw.tofile(tmp_path / "pair.bin")
    train = build_splits(tmp_path / "pair", 7, [1, 0, 0], vocab_size=100_000).train
    with pytest.raises(UnknownTokenError, match=r"holds the id -2 \(document 0, its token 5\)"):
        read(train, 0)
