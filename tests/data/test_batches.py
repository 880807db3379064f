"""Batches: the same samples whatever the ranks, exact resume, read-ahead without side effects."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.loader.batches import Batch, TrainBatches
from megatron_iiet.data.loader.order import SampleOrder
from megatron_iiet.data.loader.samples import KINDS, Samples, build_splits

Int64Array = npt.NDArray[np.int64]
T = 2
VOCABULARY = 2**31
"""Of a model that knows every id."""


class Stream:
    """A corpus of documents of 7 tokens, where token i is i; as long as it is said to be."""

    prefix = "data/counting"
    dtype = np.dtype(np.int64)
    num_documents = 0

    def __init__(self, num_tokens: int, read: Callable[[int], Any] = lambda start: None) -> None:
        self.num_tokens = num_tokens
        self._read = read

    def document_start(self, document: int) -> int:
        return 7 * document

    def document_starts(self, start: int, stop: int) -> Int64Array:
        return np.arange(-(-start // 7) * 7, stop, 7)

    def read_into(self, start: int, out: Int64Array) -> None:
        self._read(start)
        out[:] = np.arange(start, start + len(out))

    def read(self, start: int, stop: int) -> Int64Array:
        return np.arange(start, stop)

    document = None


def numbered(n: int, documents: str = "ignore", read: Callable[[int], Any] = lambda start: None) -> Samples:
    """n windows of T + 1 tokens (or what packing makes of their tokens); window i starts with i T."""
    return KINDS[documents](Stream(n * T + 1, read), 0, n * T + 1, T)


def batches(n: int | Sequence[Samples], rank: int = 0, ranks: int = 1, **options: Any) -> TrainBatches:
    defaults = {"global_batch_size": 8, "micro_batch_size": 8, "seed": 1}
    return TrainBatches(
        [numbered(n)] if isinstance(n, int) else n,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        **{**defaults, **options},
    )


def windows(batch: Batch) -> list[int]:
    return (batch.tokens[:, 0] // T).tolist()


def take(iterator: Iterator[Batch], count: int) -> list[list[int]]:
    return [windows(batch) for batch in islice(iterator, count)]


@pytest.mark.slow
@settings(max_examples=25)
@given(
    n=st.integers(1, 70),
    ranks=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 5),
)
def test_global_batches_are_the_order_of_samples(
    n: int, ranks: int, micro: int, accumulation: int, start: int
) -> None:
    size, steps = ranks * micro * accumulation, 4
    order = SampleOrder([n], [1.0], 1)
    readers = [
        batches(n, rank, ranks, global_batch_size=size, micro_batch_size=micro) for rank in range(ranks)
    ]
    for reader in readers:
        reader.load_state_dict({"samples": start * size, "windows": [n]})
    for step in range(start, start + steps):
        rows = [row for _ in range(accumulation) for reader in readers for row in take(reader, 1)[0]]
        assert rows == order(np.arange(step * size, (step + 1) * size))[1].tolist()
    assert all(reader.state_dict() == readers[0].state_dict() for reader in readers)


def written(folder: Path, name: str, lengths: Sequence[int], first: int) -> Path:
    with IndexedDatasetWriter(folder / name, 60000) as writer:
        writer.add_documents(first + np.arange(sum(lengths)), lengths)
    return folder / name


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    return [written(folder, f"c{i}", rng.integers(1, 40, n), 10_000 * i) for i, n in enumerate((300, 40, 90))]


def global_batch(readers: list[TrainBatches]) -> list[list[list[int]]]:
    """Tokens, and where there are any, positions of all rows of the next global batch."""
    rows: list[list[list[int]]] = []
    for _ in range(readers[0].micro_steps):
        for batch in map(next, readers):
            positions = [[]] * len(batch.tokens) if batch.positions is None else batch.positions.tolist()
            rows += [list(pair) for pair in zip(batch.tokens.tolist(), positions, strict=True)]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("documents", KINDS)
def test_a_blend_is_the_same_in_every_layout(documents: str, corpora: list[Path]) -> None:
    """Ranks, micro-batches, threads and the step where a run is resumed decide nothing but who reads what."""
    weights, size = [0.5, 0.2, 0.3], 24
    sources = [
        build_splits(prefix, 11, [1, 0, 0], documents, vocab_size=VOCABULARY).train for prefix in corpora
    ]

    def readers(ranks: int, micro: int, threads: int) -> list[TrainBatches]:
        return [
            batches(
                sources,
                rank,
                ranks,
                weights=weights,
                global_batch_size=size,
                micro_batch_size=micro,
                num_workers=threads,
            )
            for rank in range(ranks)
        ]

    whole = readers(1, size, 0)
    expected = [global_batch(whole) for _ in range(8)]
    for ranks, micro, threads in (
        (1, 1, 1),
        (2, 3, 0),
        (2, 12, 2),
        (3, 8, 1),
        (4, 2, 3),
        (8, 3, 1),
        (24, 1, 0),
    ):
        parts = readers(ranks, micro, threads)
        assert [global_batch(parts) for _ in range(3)] == expected[:3]
        state = parts[-1].state_dict()
        assert state["samples"] == 3 * size
        resumed = readers(size // 6, 6, threads)
        for reader in resumed:
            reader.load_state_dict(state)
        assert [global_batch(resumed) for _ in range(5)] == expected[3:]
        for reader in [*parts, *resumed]:
            reader.close()
    tokens = np.array([row[0][0] for rows in expected for row in rows])
    if documents != "pack":  # whose padding looks like the first source
        assert np.bincount(tokens // 10_000).tolist() == [96, 38, 58]  # 0.5, 0.2 and 0.3 of 192


@pytest.mark.parametrize("documents", ["reset", "pack"])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 24), (2, 3), (3, 4), (8, 1)])
def test_count_is_the_mean_over_the_global_batch(
    documents: str, ranks: int, micro: int, corpora: list[Path]
) -> None:
    sources = [
        build_splits(prefix, 11, [1, 0, 0], documents, vocab_size=VOCABULARY).train for prefix in corpora[:2]
    ]
    options: dict[str, Any] = {"weights": [1, 2], "global_batch_size": 24, "micro_batch_size": micro}
    readers = [batches(sources, rank, ranks, **options) for rank in range(ranks)]
    for _ in range(3):
        parts = [next(reader) for _ in range(readers[0].micro_steps) for reader in readers]
        counted = sum(
            int((batch.positions[:, 1:] > 0).sum()) for batch in parts if batch.positions is not None
        )
        assert 0 < counted < 24 * 11
        assert {batch.count for batch in parts} == {counted / len(parts)}


def test_every_epoch_reads_everything_once_in_another_order() -> None:
    samples = [row for rows in take(batches(21, global_batch_size=6, micro_batch_size=6), 14) for row in rows]
    epochs = [samples[start : start + 21] for start in range(0, 84, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(batches(21, seed=2), 1) != take(batches(21), 1)


def test_order_is_frozen() -> None:
    """What the first version gave, new and resumed from its own checkpoint."""
    new = batches(1000, seed=1234, global_batch_size=4, micro_batch_size=4)
    assert take(new, 2) == [[135, 57, 375, 694], [372, 497, 589, 814]]
    resumed = batches(50, 1, 2, seed=7, micro_batch_size=2)
    resumed.load_state_dict({"epoch": 2, "sample": 45})
    assert take(resumed, 4) == [[11, 9], [32, 21], [13, 11], [29, 25]]


def test_batches_larger_than_the_dataset() -> None:
    (rows,) = take(batches(3), 1)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_types(workers: int) -> None:
    batch = next(batches(20, micro_batch_size=4, num_workers=workers))
    assert (batch.tokens.dtype, batch.tokens.shape) == (torch.int64, (4, 3))
    assert (batch.positions, batch.count) == (None, None)
    batch = next(batches([numbered(20, "reset")], micro_batch_size=4, num_workers=workers))
    assert batch.positions is not None
    assert (batch.positions.dtype, batch.positions.shape) == (torch.int64, (4, 3))
    assert iter(batches(3)) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned(workers: int) -> None:
    """Copies to the GPU may still run while the next batches are read; none is overwritten."""
    options: dict[str, Any] = {"micro_batch_size": 4, "num_workers": workers}
    reader = batches([numbered(200, "reset")], pin_memory=True, **options)
    read = list(islice(reader, 300))
    assert all(batch.tokens.is_pinned() and batch.positions.is_pinned() for batch in read)
    del read
    expected = list(islice(batches([numbered(200, "reset")], **options), 600))[300:]
    for batch, plain in zip(islice(reader, 300), expected, strict=True):
        copies = [part.to("cuda", non_blocking=True) for part in batch[:2]]
        del batch
        assert all(torch.equal(copy.cpu(), part) for copy, part in zip(copies, plain[:2], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("delivered", [0, 1, 3, 8, 9, 20])
def test_resume_is_exact(workers: int, delivered: int) -> None:
    """Continuing twice, from the end of a global batch, equals never stopping."""
    uninterrupted = take(batches(37, 1, 2, micro_batch_size=2), 40)
    first = batches(37, 1, 2, micro_batch_size=2, num_workers=workers)
    assert take(first, delivered) == uninterrupted[:delivered]
    state = first.state_dict()
    full = delivered // 2 * 2  # two micro-steps a global batch: a begun one is read again
    assert state == {"samples": full * 4, "windows": [37]}
    second = batches(37, 1, 2, micro_batch_size=2, num_workers=workers)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert take(second, 4) == uninterrupted[full : full + 4]
    third = batches(37, 1, 2, micro_batch_size=2)
    third.load_state_dict(second.state_dict())
    assert take(third, 6) == uninterrupted[full + 4 : full + 10]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_left_out(workers: int) -> None:
    """Their samples are consumed unread, and a place knows them."""
    options: dict[str, Any] = {"micro_batch_size": 2, "skipped": {2}}
    whole = take(batches(37, 1, 2, micro_batch_size=2), 10)
    reader = batches(37, 1, 2, num_workers=workers, **options)
    assert [reader.leaves_out(step) for step in (1, 2, 3)] == [False, True, False]
    assert take(reader, 2) == whole[:2]
    reader.pass_over()
    reader.left_out |= {2, 3, 4, 9}
    assert take(reader, 2) == whole[4:6]
    state = reader.state_dict()
    assert state == {"samples": 24, "windows": [37], "left_out": [[2, 4], [9, 9]]}
    other = batches(37, 1, 2, **options)
    other.load_state_dict(state)
    assert other.left_out == {2, 3, 4, 9}
    assert [other.trained_steps(step) for step in (1, 3, 4, 8, 9, 10)] == [1, 1, 1, 5, 5, 6]
    other.load_state_dict({"samples": 24, "windows": [37]})
    assert other.left_out == set()


@pytest.mark.parametrize("documents", KINDS)
def test_a_global_batch_again(documents: str) -> None:
    """Without a change of the place; with the number, source and window of each row."""
    sources = [numbered(37, documents), numbered(20, documents)]
    options: dict[str, Any] = {"weights": (2.0, 1.0), "rank": 1, "ranks": 2, "micro_batch_size": 2}
    reader = batches(sources, **options)
    read = list(islice(reader, 8))
    again = list(reader.again(16))
    assert [windows(batch) for batch in again] == [windows(batch) for batch in read[4:6]]
    assert [batch.count for batch in again] == [batch.count for batch in read[4:6]]
    assert reader.consumed_samples == 32
    rows = [row for micro_step in (0, 1) for row in reader.rows_of(16, micro_step)]
    assert [sample for sample, _, _ in rows] == [18, 19, 22, 23]
    of_order, windows_of_order = reader.order([18, 19, 22, 23])
    assert [row[1:] for row in rows] == list(zip(of_order.tolist(), windows_of_order.tolist(), strict=True))


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("at_once", [1, 20, 50])
def test_the_order_is_computed_in_blocks(
    documents: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of samples; nothing shows."""
    options: dict[str, Any] = {"rank": 1, "ranks": 2, "micro_batch_size": 2}
    expected = list(islice(batches([numbered(37, documents)], **options), 40))
    monkeypatch.setattr("megatron_iiet.data.loader.batches._ORDERED_AT_ONCE", at_once)
    found = list(islice(batches([numbered(37, documents)], **options), 40))
    assert [windows(batch) for batch in found] == [windows(batch) for batch in expected]
    assert [batch.count for batch in found] == [batch.count for batch in expected]


@pytest.mark.parametrize("micro", [8, 2])
def test_loading_into_a_running_reader(micro: int) -> None:
    """Also where that is in the middle of a global batch."""
    reader = batches(37, micro_batch_size=micro, num_workers=1)
    expected = take(reader, 3)
    reader.load_state_dict({"samples": 0, "windows": [37]})
    assert take(reader, 3) == expected


def test_closing_loses_nothing() -> None:
    """Also in the middle of a global batch."""
    reader = batches(37, micro_batch_size=2, num_workers=1)
    rows = take(reader, 3)
    reader.close()
    assert rows + take(reader, 7) == take(batches(37, micro_batch_size=2), 10)


def test_places_of_the_first_version() -> None:
    """They were an epoch and a place in it."""
    for sample in (12, 19):
        reader, other = batches(20), batches(20)
        reader.load_state_dict({"epoch": 3, "sample": sample})
        other.load_state_dict({"samples": 60 + sample, "windows": [20]})
        assert take(reader, 4) == take(other, 4)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"samples": 8, "windows": [21]}, "21"),
        ({"samples": 8, "windows": [20, 4000]}, r"20 \+ 4,000"),
        ({"samples": 8, "windows": [12, 8]}, r"12 \+ 8"),
        ({"epoch": 0, "sample": 20}, "more than 20"),
    ],
)
def test_places_in_other_data(state: dict[str, Any], found: str) -> None:
    message = f"The checkpoint was trained on {found} windows, but the training split has 20; resume with"
    with pytest.raises(ValueError, match=message):
        batches(20).load_state_dict(state)


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert take(batches(30, num_workers=2), 12) == take(batches(30), 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_is_off_the_training_thread() -> None:
    threads = set()
    source = numbered(20, read=lambda start: threads.add(threading.current_thread().name))
    reader = batches([source], num_workers=2)
    take(reader, 10)
    assert threads <= {"data-reader-0", "data-reader-1"}
    del reader
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("data-reader")]


class TestFailures:
    """What a reading thread meets is raised in the training thread, when the batch is due."""

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_errors_name_the_sample(self, workers: int) -> None:
        def read(start: int) -> None:
            if start == 7 * T:
                raise OSError("Stale file handle")

        expected = take(batches(40, micro_batch_size=2), 20)
        bad = next(i for i, rows in enumerate(expected) if 7 in rows)
        reader = batches([numbered(40, read=read)], micro_batch_size=2, num_workers=workers)
        assert take(reader, bad) == expected[:bad]
        sample = 2 * bad + expected[bad].index(7)
        message = rf"sample {sample} \(window 7 of data/counting\) could not be read: Stale file handle"
        for _ in range(2):  # and again, if somebody tries again
            with pytest.raises(RuntimeError, match=message):
                next(reader)

    def test_a_file_cut_short_while_training(self, tmp_path: Path) -> None:
        prefix = written(tmp_path, "corpus", [50] * 1000, 0)
        reader = batches([build_splits(prefix, 20, [1, 0, 0], vocab_size=VOCABULARY).train], num_workers=1)
        next(reader)
        with prefix.with_suffix(".bin").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(
            RuntimeError, match=r"sample \d+ \(window \d+ of .*corpus\) could not be read: .*corpus"
        ):
            take(reader, 200)

    @pytest.mark.slow
    def test_a_file_system_that_hangs(self) -> None:
        released = threading.Event()
        hang = numbered(40, read=lambda start: start == 7 * T and released.wait(60))
        expected = take(batches(40, micro_batch_size=2), 20)
        bad = next(i for i, rows in enumerate(expected) if 7 in rows)
        reader = batches([hang], micro_batch_size=2, num_workers=1, timeout=0.5)
        take(reader, bad)
        began = time.monotonic()
        with pytest.raises(
            RuntimeError, match=r"Reading sample \d+ \(window 7 of data/counting\) takes longer"
        ):
            next(reader)
        assert time.monotonic() - began < 10
        released.set()

    def test_documents_that_cannot_be_counted(self) -> None:
        class Damaged(Stream):
            def document_starts(self, start: int, stop: int) -> Int64Array:
                raise ValueError("the index is damaged")

        reader = batches([KINDS["reset"](Damaged(41), 0, 41, T)], num_workers=1)
        with pytest.raises(
            RuntimeError, match=r"the documents of the batch of sample 0 .*: the index is damaged"
        ):
            next(reader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "The training split has no windows"),
        ({"n": 9, "micro_batch_size": 3}, "global_batch_size 8 is not a multiple of micro_batch_size 3 x 1"),
        ({"n": 9, "global_batch_size": 0}, "global_batch_size 0 is not a multiple"),
        ({"n": 9, "ranks": 2}, "micro_batch_size 8 x 2 data-parallel ranks"),
        ({"n": 9, "micro_batch_size": 0}, "micro_batch_size 0"),
        ({"n": 9, "rank": 1}, "data_parallel_rank 1 is not below 1"),
        ({"n": 9, "weights": [-1]}, "A weight of the blend is -1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**options)


def test_epoch_boundary_of_a_huge_dataset() -> None:
    n = 2**41 + 5
    reader = batches(n, micro_batch_size=4)
    place = {"samples": 4 * n - 4, "windows": [n]}
    reader.load_state_dict(place)
    rows = take(reader, 2)
    assert all(0 <= row < n for row in rows[0] + rows[1])
    assert rows[0] != rows[1]
    assert reader.state_dict() == {"samples": 4 * n + 4, "windows": [n]}
