"""The grid of processes a run lives on: pipeline × data × tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.launch import launch_environment, variables_set
from megatron_iiet.parallel.meeting import meet
from megatron_iiet.parallel.tensor import TensorParallel

_FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "512")
"""Collectives of a process that torch remembers, for when one of them does not end."""


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
    counting: Group = field(default_factory=Group)
    """The data-parallel ranks once more, on the host, for the threads that read; alone where none counts."""
    store: dist.Store | None = None
    """Where the ranks met, and may leave each other notes; None where they met elsewhere."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def start(
        cls, config: ParallelConfig | None = None, *, counting: bool = False
    ) -> Iterator[ParallelContext]:
        """Join the process group that the launcher's environment describes; leave it at the end.
        ``counting``: whether threads that read add up over the data-parallel ranks.

        Started by the DeepSpeed launcher, torchrun or srun. Without a launcher the process is a world of
        its own.

        Raises:
            ValueError: the environment is broken.
        """
        config = config or ParallelConfig()
        timeout = timedelta(seconds=config.resolved_timeouts.longest)
        environment = launch_environment()
        environment.check_master()
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", environment.local_rank), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault(*_FLIGHT_RECORDER)
        with environment.published():
            try:
                meeting = meet(environment, timeout)
            except dist.DistNetworkError as error:
                where = f"{environment.master_address}:{environment.master_port}"
                why = str(error).splitlines()[0]
                raise ValueError(
                    f"rank {environment.rank} cannot meet the others at {where} ({why}); if another job "
                    f"listens there, {environment.port_remedy}"
                ) from None
            with variables_set(**meeting.variables()), meeting.explaining():
                dist.init_process_group(
                    backend,
                    timeout=timeout,
                    store=meeting.store,
                    rank=environment.rank,
                    world_size=environment.world_size,
                )
                try:
                    context = cls.on_grid(
                        config,
                        environment.rank,
                        environment.world_size,
                        environment.local_rank,
                        device,
                        counting=counting,
                    )
                    yield replace(context, store=meeting.store)
                finally:
                    # Left to the interpreter's exit, live process groups sometimes abort it.
                    dist.destroy_process_group()

    @classmethod
    def on_grid(
        cls,
        config: ParallelConfig,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        *,
        counting: bool = False,
    ) -> ParallelContext:
        """This process's place on the configured grid; the world's process group exists already.

        Every rank calls it, in the same order, for it makes process groups.
        """
        grid = grid_ranks(world_size, config.tensor, config.pipeline)
        timeout = timedelta(seconds=config.resolved_timeouts.longest)

        def own_group(lines: torch.Tensor, name: str, **options: Any) -> Group:
            return _own_group(lines, rank, name, timeout, **options)

        replicas = grid.transpose(1, 2).flatten(0, 1)
        tensor = own_group(grid.flatten(0, 1), "tensor")
        ends = grid[[0, -1]] if config.pipeline > 1 else grid
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            world=Group(range(world_size), rank, dist.group.WORLD),
            tensor=tensor,
            data=own_group(replicas, "data", handle_for_one=True),
            pipeline=own_group(grid.flatten(1).t(), "pipeline"),
            tied=own_group(ends.flatten(1).t(), "tied"),
            tensor_parallel=TensorParallel(tensor, config.sequence),
            counting=own_group(replicas, "counting", backend="gloo") if counting else Group(),
        )

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def grid_ranks(world_size: int, tensor: int, pipeline: int) -> torch.Tensor:
    """World ranks as [pipeline, data, tensor]."""
    assert world_size % (tensor * pipeline) == 0
    return torch.arange(world_size).view(pipeline, -1, tensor)


@contextmanager
def groups_with_timeout(seconds: float) -> Iterator[None]:
    """Process groups that a library makes inside the block wait so long, unless it says otherwise."""
    make = dist.new_group
    dist.new_group = partial(make, timeout=timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.new_group = make


def _own_group(
    lines: torch.Tensor,
    rank: int,
    name: str,
    timeout: timedelta,
    *,
    handle_for_one: bool = False,
    backend: str | None = None,
) -> Group:
    """The group of the line [number, size] that ``rank`` is in; every rank must make every group.

    A rank alone sends nothing, but DeepSpeed asks for the handle of a data-parallel group of one.
    """
    own = Group((rank,))
    for line in lines.tolist():
        handle = None
        if len(line) > 1 or handle_for_one:
            handle = dist.new_group(line, timeout=timeout, backend=backend, group_desc=name)
        if rank in line:
            own = Group(line, line.index(rank), handle)
    return own
