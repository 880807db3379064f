"""Micro-batches for training, the same whatever the number of ranks.

Samples are numbered over all sources and epochs; which window of which source a number stands for is
:class:`~.order.SampleOrder`. Global batch s is samples [s G, (s + 1) G). Data-parallel size
and micro-batch only decide who reads which rows, so the state of the reader is one number and survives a
change of both.

Shape suffixes: B micro-batch, T1 window of T + 1 tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_iiet.data.corpora.mmididx import Int64Array
from megatron_iiet.data.loader.counting import Targets
from megatron_iiet.data.loader.order import SampleOrder
from megatron_iiet.data.loader.read_ahead import ReadAhead
from megatron_iiet.data.loader.samples import Samples, UnknownTokenError

_ORDERED_AT_ONCE = 16384  # samples: so many that the order costs a fraction of a microsecond each


class Batch(NamedTuple):
    """One rank's micro-batch.

    Padding tokens have position 0: each is a document of its own. Target t, which is token t + 1, counts iff
    ``positions[t + 1] > 0``.
    """

    tokens: torch.Tensor
    """int64 [B, T + 1]."""
    positions: torch.Tensor | None = None
    """int64 [B, T + 1]: place of each token in its document within the sample; 0 starts a document. None:
    each sample is one document."""
    count: float | None = None  # type: ignore[assignment]  # tuple.count is of no use here
    """With positions: counted targets of the global batch / (micro-steps * data-parallel ranks). The sum of a
    micro-batch's losses divided by it, averaged over micro-batches and ranks, is the exact mean over the
    global batch's counted targets in every layout."""


class TrainBatches:
    """Endless iterator of one rank's micro-batches.

    Micro-step m of rank r reads rows (m * ranks + r) * B ... + B of the global batch.

    Args:
        sources: what to read; all with the same sequence length and with or without positions.
        weights: of the sources, see :class:`~.blend.Blend`.
        global_batch_size: G, samples per optimizer step over all ranks.
        micro_batch_size: B.
        data_parallel_rank, data_parallel_size: this rank and the number of ranks.
        seed: names the order of samples.
        num_workers: threads that read ahead; 0 reads in this one. The order does not depend on it.
        timeout: seconds to wait for a thread.
        pin_memory: put batches in page-locked memory, for copies to a GPU in the background.
        skipped: steps, from 1, whose global batches are to be left out.
        add_up: adds int64 [n] up over the data-parallel ranks, in place, from any thread; all ranks call it
            in the same order. None: this rank counts the targets of the others too.

    Raises:
        ValueError: no windows, G is not a multiple of B * ranks, or the weights cannot be blended.
        UnknownTokenError: while iterating, a corpus holds an id outside the model's vocabulary.
        RuntimeError: while iterating, a sample could not be read, or not in time.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        weights: Sequence[float] = (1.0,),
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        num_workers: int = 0,
        timeout: float = 300.0,
        pin_memory: bool = False,
        skipped: Collection[int] = (),
        add_up: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        if (
            micro_batch_size < 1
            or global_batch_size < 1
            or global_batch_size % (micro_batch_size * data_parallel_size)
        ):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x {data_parallel_size} data-parallel ranks; change one of them."
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank {data_parallel_rank} is not below {data_parallel_size}.")
        self.sources = sources
        self.order = SampleOrder([len(source) for source in sources], weights, seed)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.micro_steps = global_batch_size // (micro_batch_size * data_parallel_size)
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._num_workers, self._timeout, self._pin_memory = num_workers, timeout, pin_memory
        self.skipped = frozenset(skipped)
        self.left_out: set[int] = set()
        """Steps, from 1, whose samples did not train the model, or will not: a part of the place in the data,
        so that whoever goes on from it knows them."""
        self._start = 0  # first sample of the first global batch since the last load
        self._delivered = 0  # micro-batches handed out since then
        self._batches: Iterator[Batch] | None = None
        self._plan: _Plan | None = None
        self._add_up = add_up

    @property
    def consumed_samples(self) -> int:
        """Samples of all fully delivered global batches, over all epochs."""
        return self._start + self._delivered // self.micro_steps * self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Where the next global batch starts, what it is a place in, and what was left out, if anything."""
        windows = [len(source) for source in self.sources]
        left_out = {"left_out": as_ranges(self.left_out)} if self.left_out else {}
        return {"samples": self.consumed_samples, "windows": windows} | left_out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved place, also under another batch size or number of ranks.

        Raises:
            ValueError: it is a place in other data.
        """
        windows = [len(source) for source in self.sources]
        if "epoch" in state:  # written before there were blends
            samples, fits = state["epoch"] * windows[0] + state["sample"], state["sample"] < windows[0]
            found = f"more than {state['sample']:,}"
        else:
            samples, fits = state["samples"], state["windows"] == windows
            found = listed(state["windows"])
        if not fits:
            raise ValueError(
                f"The checkpoint was trained on {found} windows, but the training split has "
                f"{listed(windows)}; resume with the corpora, data.split and data.sequence_length of the "
                "checkpoint."
            )
        self.settle()
        self.close()
        self._start = samples
        self._delivered = 0
        self.left_out = of_ranges(state.get("left_out", []))

    def leaves_out(self, step: int) -> bool:
        """Whether the samples of a step, from 1, are not to be trained on."""
        return step in self.skipped or step in self.left_out

    def trained_steps(self, step: int) -> int:
        """How many of the steps up to this one trained the model."""
        return step - sum(left_out <= step for left_out in self.left_out)

    def pass_over(self) -> None:
        """Go on to the next global batch without reading this one."""
        self.settle()
        self.close()
        self._delivered += self.micro_steps

    def again(self, first_sample: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch that starts at a sample; the place stays."""
        plan = _Plan(self, first_sample)  # counts alone: the threads may be adding up at this moment
        return (_MicroBatch(plan, number, self._pin_memory).run() for number in range(self.micro_steps))

    def rows_of(self, first_sample: int, micro_step: int) -> list[tuple[int, int, int]]:
        """Sample, source and window of each of this rank's rows of a micro-step of that global batch."""
        plan = _Plan(self, first_sample)
        sources, windows, _ = plan.rows(micro_step)
        samples = range(plan.first_sample(micro_step), plan.first_sample(micro_step) + len(windows))
        return list(zip(samples, sources, windows, strict=True))

    def settle(self) -> None:
        """Add up with the other ranks what their threads may wait for, before these here end and the run goes
        on; every rank calls it after the same batch."""
        if self._plan is not None:
            self._plan.settle()

    def close(self) -> None:
        """End the reading threads; they come back when another batch is wanted."""
        if isinstance(self._batches, ReadAhead):
            self._batches.close()
        self._batches = self._plan = None

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self._delivered += 1
        return batch

    def _read(self) -> Iterator[Batch]:
        # Nothing below may refer to self: threads end when their reader does, which a cycle would delay.
        plan = self._plan = _Plan(self, self._start, self._delivered, self._add_up)
        jobs = (_MicroBatch(plan, number, self._pin_memory) for number in count(self._delivered))
        if self._num_workers == 0:
            return (job.run() for job in jobs)
        return ReadAhead(jobs, self._num_workers, self._timeout)


class _Plan:
    """What each micro-step of this rank reads, counted from the first one here; shared by the threads.

    Shape suffixes: M micro-steps of a global batch.
    """

    def __init__(
        self,
        batches: TrainBatches,
        first: int,
        step: int = 0,
        add_up: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        """``first``: sample that the first global batch starts with; ``step``: the first micro-step."""
        self.sources = batches.sources
        self.shape = (batches.micro_batch_size, self.sources[0].sequence_length + 1)
        self.has_positions = self.sources[0].has_positions
        self._order = batches.order
        self._first, self._global_size = first, batches.global_batch_size
        self._micro_steps = batches.micro_steps
        self._micro_batches = self._micro_steps * batches._ranks
        dealt = np.arange(self._global_size).reshape(self._micro_steps, batches._ranks, self.shape[0])
        self._own_MB = dealt[:, batches._rank]
        # Whoever counts alone takes the rows of all ranks, reading takes this rank's.
        alone = self.has_positions and add_up is None
        self._rows = dealt.ravel() if alone else self._own_MB.ravel()
        self._at_once = max(1, _ORDERED_AT_ONCE // len(self._rows))  # global batches
        self._lock = threading.Lock()  # so that no two threads compute the same
        self._ordered = lru_cache(2)(self._order_batches)
        self.drawn = step  # the last micro-step that somebody reads
        self.targets = Targets(self._count_targets, add_up, step // self._micro_steps)

    def first_sample(self, step: int) -> int:
        """Number of the sample in the first row of micro-step ``step``."""
        batch, micro_step = divmod(step, self._micro_steps)
        return self._first + batch * self._global_size + int(self._own_MB[micro_step, 0])

    def rows(self, step: int) -> tuple[list[int], list[int], float | None]:
        """Source and window of each row of micro-step ``step``, and the count of its batch."""
        batch, micro_step = divmod(step, self._micro_steps)
        with self._lock:
            sources, windows = self._batch(batch)
        count = self.targets(batch) / self._micro_batches if self.has_positions else None
        own = np.searchsorted(self._rows, self._own_MB[micro_step])
        return sources[own].tolist(), windows[own].tolist(), count

    def _batch(self, batch: int) -> tuple[Int64Array, Int64Array]:
        """Sources and windows of the rows of a global batch."""
        block, inside = divmod(batch, self._at_once)
        sources, windows = self._ordered(block)
        return sources[inside], windows[inside]

    def _order_batches(self, block: int) -> tuple[Int64Array, Int64Array]:
        """The same for a block of global batches: the order of many samples costs little more than of one."""
        batches = np.arange(block * self._at_once, (block + 1) * self._at_once)
        samples = self._first + np.add.outer(batches * self._global_size, self._rows)
        sources, windows = self._order(samples.ravel())
        return sources.reshape(samples.shape), windows.reshape(samples.shape)

    def _count_targets(self, batch: int) -> int:
        """Targets of the rows of a global batch."""
        with self._lock:
            sources, windows = self._batch(batch)
        return sum(self.sources[i].counted(windows[sources == i]) for i in np.unique(sources).tolist())

    def settle(self) -> None:
        """Add up the targets of every batch that somebody reads."""
        if self.has_positions:
            self.targets.settle(self.drawn // self._micro_steps)


class _MicroBatch:
    """The job of reading one micro-batch."""

    def __init__(self, plan: _Plan, step: int, pin_memory: bool) -> None:
        # Allocated in the training thread, whose device is the right one to register the memory with.
        self._tokens = torch.empty(plan.shape, dtype=torch.int64, pin_memory=pin_memory)
        self._positions = (
            torch.empty_like(self._tokens, pin_memory=pin_memory) if plan.has_positions else None
        )
        self._plan, self._step = plan, step
        plan.drawn = step
        self._reading: tuple[int, int, int] | None = None  # row, source, window

    @property
    def waits_for_ranks(self) -> bool:
        return self._plan.targets.waiting

    def run(self) -> Batch:
        plan = self._plan
        tokens = self._tokens.numpy()
        positions = [None] * len(tokens) if self._positions is None else self._positions.numpy()
        try:
            sources, windows, counted = plan.rows(self._step)
            for row, (source, window) in enumerate(zip(sources, windows, strict=True)):
                self._reading = (row, source, window)
                plan.sources[source].fill(window, tokens[row], positions[row])
        except UnknownTokenError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self} could not be read: {error}") from error
        return Batch(self._tokens, self._positions, counted)

    def __str__(self) -> str:
        first = self._plan.first_sample(self._step)
        if self._reading is None:
            return f"the documents of the batch of sample {first}"
        row, source, window = self._reading
        return f"sample {first + row} (window {window} of {self._plan.sources[source].stream.prefix})"


def listed(numbers: Sequence[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)


def as_ranges(steps: Iterable[int]) -> list[list[int]]:
    """Numbers as [first, last] of every run of them, in order."""
    ranges: list[list[int]] = []
    for step in sorted(steps):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ranges


def of_ranges(ranges: Iterable[Sequence[int]]) -> set[int]:
    """What :func:`as_ranges` was given."""
    return {step for first, last in ranges for step in range(first, last + 1)}
