"""Micro-batches for training and validation, the same whatever the number of ranks.

Sample number g counts over all epochs; with n windows it is position g mod n of epoch g div n, whose order
is :class:`~megatron_iiet.data.permutation.Permutation` (seed, epoch). Global batch s is samples
[s G, (s + 1) G). Data-parallel size and micro-batch only decide who reads which rows, so the state of the
reader is one number and survives a change of both.

Shape suffixes: B micro-batch, T1 window of T + 1 tokens.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from megatron_iiet.data.permutation import Permutation


class Windows(Protocol):
    """A map-style dataset of int64 [T + 1] windows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


class TrainBatches:
    """Endless iterator of one rank's micro-batches, int64 [B, T + 1].

    Micro-step m of rank r reads rows (m * ranks + r) * B ... + B of the global batch.

    Args:
        dataset: windows to read.
        global_batch_size: G, samples per optimizer step over all ranks.
        micro_batch_size: B.
        data_parallel_rank, data_parallel_size: this rank and the number of ranks.
        seed: names the order of samples.
        num_workers: processes that read ahead; 0 reads in this one. The order does not depend on it.

    Raises:
        ValueError: no windows, or G is not a multiple of B * ranks.
        RuntimeError: while iterating, a reading process died.
    """

    def __init__(
        self,
        dataset: Windows,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("The training split has no windows; use more text or a shorter sequence_length.")
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
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.micro_steps = global_batch_size // (micro_batch_size * data_parallel_size)
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._seed = seed
        self._num_workers = num_workers
        self._start = 0  # first sample of the first global batch since the last load
        self._delivered = 0  # micro-batches handed out since then
        self._batches: Iterator[torch.Tensor] | None = None

    @property
    def consumed_samples(self) -> int:
        """Samples of all fully delivered global batches, over all epochs."""
        return self._start + self._delivered // self.micro_steps * self.global_batch_size

    def state_dict(self) -> dict[str, int]:
        """Where the next global batch starts: its epoch and the position within it."""
        epoch, sample = divmod(self.consumed_samples, len(self.dataset))
        return {"epoch": epoch, "sample": sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved place, also under another batch size or number of ranks.

        Raises:
            ValueError: the place does not exist in this dataset.
        """
        epoch, sample, n = state["epoch"], state["sample"], len(self.dataset)
        if epoch < 0 or not 0 <= sample < n:
            raise ValueError(
                f"The checkpoint stopped at epoch {epoch}, sample {sample}, but the training split has {n} "
                "windows; resume with the data.prefix, split and sequence_length of the checkpoint."
            )
        self._start = epoch * n + sample
        self._delivered = 0
        self._batches = None  # read-ahead of the old place is dropped with its processes

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> torch.Tensor:
        if self._batches is None:
            self._batches = self._read()
        tokens_BT1 = next(self._batches)
        self._delivered += 1
        return tokens_BT1

    def _read(self) -> Iterator[torch.Tensor]:
        # Nothing below may refer to self: a cycle would leave the reading processes to the garbage collector,
        # which takes them down in an order that costs five seconds each.
        dataset = self.dataset
        order = _Order(len(dataset), self._seed)
        size = self.micro_batch_size
        first, step = self._start + self._rank * size, self._ranks * size
        rows = (order.windows(np.arange(i, i + size)).tolist() for i in count(first, step))
        if self._num_workers == 0:
            return (_stack(dataset, indices) for indices in rows)
        loader: DataLoader[torch.Tensor] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=_Endless(rows),
            num_workers=self._num_workers,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else each start draws from the generator that dropout uses
        )
        return iter(loader)


class _Order:
    """Sample numbers over all epochs -> window numbers."""

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._seed = seed
        self._current = (0, Permutation(n, seed, 0))

    def windows(self, samples_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Windows of samples [B]; an epoch may end within them."""
        epochs_B, positions_B = np.divmod(samples_B, self._n)
        windows_B = np.empty_like(samples_B)
        for epoch in np.unique(epochs_B).tolist():
            if epoch != self._current[0]:
                self._current = (epoch, Permutation(self._n, self._seed, epoch))
            inside_B = epochs_B == epoch
            windows_B[inside_B] = self._current[1](positions_B[inside_B])
        return windows_B


def _stack(dataset: Windows, indices: Sequence[int]) -> torch.Tensor:
    return torch.stack([dataset[index] for index in indices])


class _Endless:
    """A batch sampler without length, which is all a DataLoader needs."""

    def __init__(self, rows: Iterator[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return self._rows


def _ignore_signals(worker_id: int) -> None:
    """Forked readers inherit the trainer's handlers, which would save checkpoints; the trainer ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


class ValidationBatch(NamedTuple):
    """One rank's rows: int64 [B, T + 1] and float32 [B], 1 for a sample and 0 for a filler row."""

    tokens: torch.Tensor
    weights: torch.Tensor


class ValidationBatches:
    """The first windows of a split, dealt to the ranks as in training; re-iterable.

    Every rank gets the same number of batches of the same shape, so collectives match by construction. Where
    the samples run out, rows are filled with copies of window 0 of weight 0: a mean weighted by
    ``ValidationBatch.weights`` is over exactly :attr:`samples` windows whatever the number of ranks.

    Args:
        dataset: windows to read.
        samples: windows wanted; all of them if there are fewer.
        micro_batch_size: B.
        dp_rank, dp_size: this data-parallel rank and the number of ranks.

    Raises:
        ValueError: there is nothing to read.
    """

    def __init__(
        self, dataset: Windows, *, samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self.samples = min(samples, len(dataset))
        if self.samples < 1:
            raise ValueError(
                f"Nothing to validate on: {samples} samples wanted, the split has {len(dataset)} windows; "
                "give validation a share in data.split and evaluation.samples at least 1."
            )
        self._dataset = dataset
        self._size, self._rank, self._ranks = micro_batch_size, dp_rank, dp_size

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-self.samples // (self._size * self._ranks))

    def __iter__(self) -> Iterator[ValidationBatch]:
        for batch in range(len(self)):
            first = (batch * self._ranks + self._rank) * self._size
            rows = range(first, first + self._size)
            tokens_BT1 = _stack(self._dataset, [row if row < self.samples else 0 for row in rows])
            yield ValidationBatch(tokens_BT1, torch.tensor([float(row < self.samples) for row in rows]))
