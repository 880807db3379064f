"""The grid of processes a run lives on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ParallelContext:
    """Who this process is. Made once by :meth:`start`, then passed in; there is no global."""

    rank: int
    """Rank in the world."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank on this host; picks the device."""
    device: torch.device
    """Where this process's parameters live."""

    @property
    def data_parallel_rank(self) -> int:
        """Rank among the replicas that split a global batch."""
        return self.rank

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas that split a global batch."""
        return self.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def start(cls, timeout: timedelta = timedelta(minutes=30)) -> Iterator[ParallelContext]:
        """Join the process group that the launcher's environment describes; leave it at the end.

        Started by the DeepSpeed launcher or torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
        MASTER_PORT). Without a launcher the process is a world of its own.
        """
        rank, world_size, local_rank = launch_environment()
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
        dist.init_process_group(backend, timeout=timeout)
        try:
            yield cls(rank, world_size, local_rank, device)
        finally:
            # Left to the interpreter's exit, live process groups sometimes abort it.
            dist.destroy_process_group()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the data-parallel ranks, in place; the same bits on every rank."""
        dist.all_reduce(value)
        return value.div_(self.data_parallel_size)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def launch_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) of the launcher, or of a world of one, whose variables are then set."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
