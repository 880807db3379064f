"""Batches: the same samples whatever the ranks, exact resume, read-ahead without side effects."""

from __future__ import annotations

import os
import signal
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.batches import TrainBatches, ValidationBatches


class Numbered:
    """Window i is [i, i, i]."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return torch.full((3,), index)


class Dying(Numbered):
    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def batches(n: int, rank: int = 0, ranks: int = 1, **options: Any) -> TrainBatches:
    defaults = {"global_batch_size": 8, "micro_batch_size": 8, "seed": 1}
    return TrainBatches(
        options.pop("dataset", Numbered(n)),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **{**defaults, **options},
    )


def take(iterator: TrainBatches, count: int) -> list[list[int]]:
    return [tokens[:, 0].tolist() for tokens in islice(iterator, count)]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 70),
    ranks=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 5),
)
def test_global_batches_do_not_depend_on_the_layout(
    n: int, ranks: int, micro: int, accumulation: int, start: int
) -> None:
    size, steps = ranks * micro * accumulation, 4
    whole = batches(n, global_batch_size=size, micro_batch_size=size)
    expected = take(whole, start + steps)[start:]
    rows: list[list[int]] = [[] for _ in range(steps)]
    readers = [
        batches(n, rank, ranks, global_batch_size=size, micro_batch_size=micro) for rank in range(ranks)
    ]
    for reader in readers:
        epoch, sample = divmod(start * size, n)
        reader.load_state_dict({"epoch": epoch, "sample": sample})
    for step in range(steps):
        for _ in range(accumulation):
            for reader in readers:
                rows[step] += take(reader, 1)[0]
    assert rows == expected
    assert all(reader.state_dict() == whole.state_dict() for reader in readers)


def test_every_epoch_reads_everything_once_in_another_order() -> None:
    samples = [row for rows in take(batches(21, global_batch_size=6, micro_batch_size=6), 14) for row in rows]
    epochs = [samples[start : start + 21] for start in range(0, 84, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(batches(21, seed=2), 1) != take(batches(21), 1)


def test_batches_larger_than_the_dataset() -> None:
    (rows,) = take(batches(3), 1)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_types() -> None:
    tokens = next(batches(20, micro_batch_size=4))
    assert (tokens.dtype, tokens.shape) == (torch.int64, (4, 3))
    assert iter(batches(3)) is not None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("delivered", [0, 1, 3, 8, 9, 20])
def test_resume_is_exact(workers: int, delivered: int) -> None:
    """Continuing twice, from the end of a global batch, equals never stopping."""
    uninterrupted = take(batches(37, 1, 2, micro_batch_size=2), 40)
    first = batches(37, 1, 2, micro_batch_size=2, num_workers=workers)
    assert take(first, delivered) == uninterrupted[:delivered]
    state = first.state_dict()
    full = delivered // 2 * 2  # two micro-steps a global batch: a begun one is read again
    assert state == {"epoch": full * 4 // 37, "sample": full * 4 % 37}
    second = batches(37, 1, 2, micro_batch_size=2, num_workers=workers)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert take(second, 4) == uninterrupted[full : full + 4]
    third = batches(37, 1, 2, micro_batch_size=2)
    third.load_state_dict(second.state_dict())
    assert take(third, 6) == uninterrupted[full + 4 : full + 10]


def test_loading_into_a_running_reader() -> None:
    reader = batches(37, num_workers=1)
    expected = take(reader, 3)
    reader.load_state_dict({"epoch": 0, "sample": 0})
    assert take(reader, 3) == expected


@pytest.mark.parametrize("state", [{"epoch": 0, "sample": 20}, {"epoch": -1, "sample": 0}])
def test_places_that_do_not_exist(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="but the training split has 20 windows; resume with"):
        batches(20).load_state_dict(state)


def test_workers_change_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert take(batches(30, num_workers=2), 12) == take(batches(30), 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_dead_worker_raises() -> None:
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        next(batches(20, dataset=Dying(20), num_workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "The training split has no windows"),
        ({"n": 9, "micro_batch_size": 3}, "global_batch_size 8 is not a multiple of micro_batch_size 3 x 1"),
        ({"n": 9, "ranks": 2}, "micro_batch_size 8 x 2 data-parallel ranks"),
        ({"n": 9, "micro_batch_size": 0}, "micro_batch_size 0"),
        ({"n": 9, "rank": 1}, "data_parallel_rank 1 is not below 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**options)


def test_epoch_boundary_of_a_huge_dataset() -> None:
    n = 2**41 + 5

    class Huge(Numbered):
        def __len__(self) -> int:
            return n

    reader = batches(n, dataset=Huge(n), micro_batch_size=4)
    reader.load_state_dict({"epoch": 3, "sample": n - 4})
    assert all(0 <= row < n for rows in take(reader, 2) for row in rows)
    assert reader.state_dict() == {"epoch": 4, "sample": 4}


class TestValidation:
    @given(n=st.integers(1, 40), samples=st.integers(1, 50), micro=st.integers(1, 5), ranks=st.integers(1, 4))
    def test_every_sample_once_on_equal_ranks(self, n: int, samples: int, micro: int, ranks: int) -> None:
        readers = [
            ValidationBatches(
                Numbered(n), samples=samples, micro_batch_size=micro, dp_rank=rank, dp_size=ranks
            )
            for rank in range(ranks)
        ]
        assert len({len(reader) for reader in readers}) == 1
        seen = []
        for reader in readers:
            found = list(reader)
            assert len(found) == len(reader)
            for tokens, weights in found:
                assert (tokens.shape, weights.shape) == ((micro, 3), (micro,))
                seen += tokens[weights == 1, 0].tolist()
                assert set(weights.tolist()) <= {0.0, 1.0}
        assert sorted(seen) == list(range(min(n, samples)))
        assert readers[0].samples == min(n, samples)

    def test_the_same_every_time(self) -> None:
        reader = ValidationBatches(Numbered(9), samples=5, micro_batch_size=2, dp_rank=0, dp_size=1)
        once, again = list(reader), list(reader)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(once, again, strict=True))
        assert (once[0].tokens.dtype, once[0].weights.dtype) == (torch.int64, torch.float32)

    @pytest.mark.parametrize(("n", "samples"), [(0, 5), (5, 0)])
    def test_nothing_to_read(self, n: int, samples: int) -> None:
        with pytest.raises(ValueError, match=f"Nothing to validate on: {samples} samples wanted"):
            ValidationBatches(Numbered(n), samples=samples, micro_batch_size=1, dp_rank=0, dp_size=1)
