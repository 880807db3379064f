"""The grid of processes a run lives on: pipeline × data × tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.launch import LaunchEnvironment, launch_environment, restarts
from megatron_iiet.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class ParallelContext:
    """Who this process is. Made once by :meth:`start`, then passed in; there is no global.

    ``rank = (pipeline_rank · data_size + data_rank) · tensor_size + tensor_rank``: tensor-parallel ranks are
    neighbours (they talk most, and share a host), pipeline stages are farthest apart (they talk least).
    """

    rank: int
    """Rank in the world."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank on this host; picks the device."""
    device: torch.device
    """Where this process's parameters live."""
    world: Group
    """All ranks."""
    tensor: Group
    """Ranks that share this rank's matrices."""
    data: Group
    """Ranks that hold the same parameters and read other samples: the replicas that split a global batch."""
    pipeline: Group
    """Ranks that hold the other stages of this rank's model."""
    tied: Group
    """First and last rank of the pipeline, which both hold a tied embedding; alone in between."""
    tensor_parallel: TensorParallel
    """What layers are built with."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def start(
        cls, config: ParallelConfig | None = None, timeout: timedelta = timedelta(minutes=30)
    ) -> Iterator[ParallelContext]:
        """Join the process group that the launcher's environment describes; leave it at the end.

        Started by the DeepSpeed launcher, torchrun or srun. Without a launcher the process is a world of
        its own.

        Raises:
            ValueError: the environment is broken.
        """
        config = config or ParallelConfig()
        environment = launch_environment()
        environment.check_master()
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", environment.local_rank), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
        with environment.published():
            try:
                store = _store(environment, timeout)
                dist.init_process_group(
                    backend,
                    timeout=timeout,
                    store=store,
                    rank=environment.rank,
                    world_size=environment.world_size,
                )
            except dist.DistNetworkError as error:
                where = f"{environment.master_address}:{environment.master_port}"
                why = str(error).splitlines()[0]
                raise ValueError(
                    f"rank {environment.rank} cannot meet the others at {where} ({why}); if another job "
                    f"listens there, {environment.port_remedy}"
                ) from None
            try:
                yield cls.on_grid(
                    config, environment.rank, environment.world_size, environment.local_rank, device
                )
            finally:
                # Left to the interpreter's exit, live process groups sometimes abort it.
                dist.destroy_process_group()

    @classmethod
    def on_grid(
        cls, config: ParallelConfig, rank: int, world_size: int, local_rank: int, device: torch.device
    ) -> ParallelContext:
        """This process's place on the configured grid; the world's process group exists already.

        Every rank calls it, in the same order, for it makes process groups.
        """
        grid = grid_ranks(world_size, config.tensor, config.pipeline)
        tensor = _own_group(grid.flatten(0, 1), rank)
        ends = grid[[0, -1]] if config.pipeline > 1 else grid
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            world=Group(range(world_size), rank, dist.group.WORLD),
            tensor=tensor,
            data=_own_group(grid.transpose(1, 2).flatten(0, 1), rank, handle_for_one=True),
            pipeline=_own_group(grid.flatten(1).t(), rank),
            tied=_own_group(ends.flatten(1).t(), rank),
            tensor_parallel=TensorParallel(tensor, config.sequence),
        )

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def _store(environment: LaunchEnvironment, timeout: timedelta) -> dist.Store | None:
    """Where the ranks meet; None: torch makes it where the environment says.

    One process meets nobody: no port, which another could take between finding and using it. And torchrun's
    agent restarts ranks with the store that it has: there torch would find what the ones before left.
    """
    if environment.world_size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = environment.master_address, environment.master_port
    store = dist.TCPStore(address, port, environment.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start {restarts()}", store)


def grid_ranks(world_size: int, tensor: int, pipeline: int) -> torch.Tensor:
    """World ranks as [pipeline, data, tensor]."""
    assert world_size % (tensor * pipeline) == 0
    return torch.arange(world_size).view(pipeline, -1, tensor)


def _own_group(lines: torch.Tensor, rank: int, *, handle_for_one: bool = False) -> Group:
    """The group of the line [number, size] that ``rank`` is in; every rank must make every group.

    A rank alone sends nothing, but DeepSpeed asks for the handle of a data-parallel group of one.
    """
    own = Group((rank,))
    for line in lines.tolist():
        handle = dist.new_group(line) if len(line) > 1 or handle_for_one else None
        if rank in line:
            own = Group(line, line.index(rank), handle)
    return own
