"""Targets of a global batch, counted by each rank in its own rows: the sums are those of one rank that counts
all, whatever is read ahead, passed over or read anew; and nobody waits for a rank that cannot count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import torch

from megatron_iiet.data.loader.batches import Batch, TrainBatches
from megatron_iiet.data.loader.counting import Targets
from megatron_iiet.data.loader.samples import KINDS
from tests.data.test_batches import Int64Array, Stream, T, batches, numbered

RANKS = 3
SECONDS = 20.0


class Exchange:
    """Sums over ranks that are threads: call n of one meets call n of the others, as in a process group."""

    def __init__(self) -> None:
        self.calls = [0] * RANKS
        self._sums: list[torch.Tensor] = []
        self._came: list[int] = []
        self._changed = threading.Condition()

    def of(self, rank: int) -> Callable[[torch.Tensor], None]:
        def add_up(numbers: torch.Tensor) -> None:
            with self._changed:
                number, self.calls[rank] = self.calls[rank], self.calls[rank] + 1
                if number == len(self._sums):
                    self._sums.append(torch.zeros_like(numbers))
                    self._came.append(0)
                self._sums[number] += numbers
                self._came[number] += 1
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._came[number] == RANKS, SECONDS):
                    raise TimeoutError(f"call {number} of rank {rank} met nobody")
                numbers.copy_(self._sums[number])

        return add_up


def on_all_ranks(work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(RANKS) as pool:
        return [each.result(SECONDS) for each in [pool.submit(work, rank) for rank in range(RANKS)]]


def script(reader: TrainBatches) -> list[Batch]:
    """Reads, passes over, goes back and on, once from the middle of a global batch."""
    read = list(islice(reader, 5))
    reader.load_state_dict({"samples": 24, "windows": [len(source) for source in reader.sources]})
    read += islice(reader, 4)
    reader.pass_over()
    read += islice(reader, 6)
    assert [batch.count for batch in reader.again(24)] == [read[5].count] * 2  # while threads add up
    reader.settle()
    reader.close()
    return read


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("documents", ["reset", "pack"])
def test_sums_are_those_of_one_who_counts_all(documents: str, workers: int) -> None:
    sources = [numbered(37, documents), numbered(20, documents)]
    exchange = Exchange()

    def read(rank: int, add_up: Any = None) -> list[Batch]:
        options: dict[str, Any] = {"weights": (2.0, 1.0), "global_batch_size": 12, "micro_batch_size": 2}
        return script(batches(sources, rank, RANKS, num_workers=workers, add_up=add_up, **options))

    found = on_all_ranks(lambda rank: read(rank, exchange.of(rank)))
    for rank in range(RANKS):
        for batch, expected in zip(found[rank], read(rank), strict=True):
            assert torch.equal(batch.tokens, expected.tokens)
            assert batch.count == expected.count
    assert len({batch.count for batch in found[0]}) > 1
    assert len(set(exchange.calls)) == 1, "no sum is left that others wait for"


def test_a_rank_looks_at_its_own_rows_only() -> None:
    looked: set[int] = set()

    class Watched(Stream):
        def document_starts(self, start: int, stop: int) -> Int64Array:
            looked.add((start - 1) // T)
            return super().document_starts(start, stop)

    source = KINDS["reset"](Watched(40 * T + 1), 0, 40 * T + 1, T)
    reader = batches([source], 1, 2, micro_batch_size=4, add_up=lambda numbers: None)
    next(reader)
    seen = set(looked)
    assert seen == {window for _, _, window in reader.rows_of(0, 0)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_cannot_count(workers: int) -> None:
    """Says why, and the others, which wait for its number, that it could not."""

    class Damaged(Stream):
        def document_starts(self, start: int, stop: int) -> Int64Array:
            raise ValueError("the index is damaged")

    exchange = Exchange()

    def read(rank: int) -> str:
        stream = (Damaged if rank == 1 else Stream)(41)
        source = KINDS["reset"](stream, 0, 41, T)
        options: dict[str, Any] = {"global_batch_size": 6, "micro_batch_size": 2, "num_workers": workers}
        with pytest.raises(RuntimeError) as caught:
            next(batches([source], rank, RANKS, add_up=exchange.of(rank), **options))
        return str(caught.value)

    place = "the documents of the batch of sample {} could not be read: "
    assert on_all_ranks(read) == [
        place.format(0) + "1 other rank(s) could not, whose messages say why",
        place.format(2) + "the index is damaged",
        place.format(4) + "1 other rank(s) could not, whose messages say why",
    ]


def test_a_rank_that_is_gone() -> None:
    def add_up(numbers: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match=r"another rank has ended, .* \(Connection closed by peer\)"):
        Targets(lambda batch: 1, add_up, 0)(0)


def test_waiting_for_ranks_is_no_fault_of_the_file_system() -> None:
    """``data.timeout`` is not for it."""
    late = threading.Event()
    patience = 0.05

    def add_up(numbers: torch.Tensor) -> None:
        assert not late.wait(6 * patience)
        assert reader._plan is not None
        assert reader._plan.targets.waiting

    reader = batches([numbered(40, "reset")], num_workers=1, timeout=patience, add_up=add_up)
    assert next(reader).count is not None
    reader.close()
