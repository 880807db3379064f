"""Which ranks meet in which group of a grid; no process is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel import context as context_module
from tests.distributed.harness import free_port, run_ranks
from tests.parallel.test_launch import SRUN_TASK

TENSOR, PIPELINE, DATA = 2, 3, 2
PLACES = {
    # rank: (tensor, data, pipeline, tied)
    0: ([0, 1], [0, 2], [0, 4, 8], [0, 8]),
    3: ([2, 3], [1, 3], [3, 7, 11], [3, 11]),
    6: ([6, 7], [4, 6], [2, 6, 10], [6]),
    9: ([8, 9], [9, 11], [1, 5, 9], [1, 9]),
}


@pytest.mark.parametrize("rank", PLACES)
def test_groups_of_a_grid(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are outermost, as DeepSpeed's pipeline counts them, then replicas, then tensor-parallel ranks;
    a stage between the first and the last has no part of a tied embedding."""
    made: list[Sequence[int]] = []
    timeouts, names = set(), []

    def new_group(ranks: Sequence[int], timeout: timedelta, backend: str | None, group_desc: str) -> str:
        made.append(ranks)
        timeouts.add(timeout)
        names.append(group_desc)
        assert backend == ("gloo" if group_desc == "counting" else None), "threads that read have no GPU"
        return f"handle of {ranks}"

    distributed = SimpleNamespace(new_group=new_group, group=SimpleNamespace(WORLD="all"))
    monkeypatch.setattr(context_module, "dist", distributed)
    context = ParallelContext.on_grid(
        ParallelConfig(tensor=TENSOR, pipeline=PIPELINE, timeouts={"start": 50, "save": 70}),
        rank,
        12,
        0,
        torch.device("cpu"),
        counting=True,
    )
    assert context.counting.ranks == context.data.ranks
    groups = (context.tensor, context.data, context.pipeline, context.tied)
    assert tuple(list(group.ranks) for group in groups) == PLACES[rank]
    for group in groups:
        assert group.ranks[group.rank] == rank
        assert group.size == 1 or group.handle == f"handle of {list(group.ranks)}"
    assert context.data.size == DATA
    assert len(made) == 6 + 6 + 4 + 4 + 6, "every rank makes every group"
    assert timeouts == {timedelta(seconds=70)}, "any of them may wait for the longest"
    assert names == ["tensor"] * 6 + ["data"] * 6 + ["pipeline"] * 4 + ["tied"] * 4 + ["counting"] * 6


def test_of_groups_of_one_only_the_data_parallel_one_has_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for it; another one would cost a group, and threads, for nothing."""
    made: list[tuple[str, list[int]]] = []

    def new_group(ranks: list[int], group_desc: str, **_: Any) -> str:
        made.append((group_desc, ranks))
        return group_desc

    monkeypatch.setattr(
        context_module, "dist", SimpleNamespace(new_group=new_group, group=SimpleNamespace(WORLD="all"))
    )
    context = ParallelContext.on_grid(ParallelConfig(), 0, 1, 0, torch.device("cpu"), counting=True)
    assert made == [("data", [0])]
    assert context.data.handle == "data"
    for group in (context.tensor, context.pipeline, context.tied, context.counting):
        assert (group.ranks, group.handle) == ((0,), None)
    assert (context.world.handle, context.rank, context.world_size) == ("all", 0, 1)
    without = ParallelContext.on_grid(ParallelConfig(tensor=2), 1, 2, 1, torch.device("cpu"))
    assert without.counting.ranks == (0,)
    assert [name for name, _ in made[1:]] == ["tensor", "data", "data"]


@pytest.mark.parametrize(
    ("launched", "remedy"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "give this one's launcher another --master_port"),
        (SRUN_TASK | {"SLURM_PROCID": "0"}, "set MASTER_PORT to another"),
    ],
    ids=["deepspeed", "srun"],
)
def test_a_port_that_another_job_has(
    launched: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second job on a node finds it that was started with the launcher's default port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in (launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with (
            pytest.raises(
                ValueError,
                match=rf"rank 0 cannot meet the others at 127\.0\.0\.1:{port} \(.*in use.*{remedy}$",
            ),
            ParallelContext.start(),
        ):
            pytest.fail("there is a group")


def meet(port: int) -> list[int]:
    """As the launchers other than torchrun have it; the addresses at which the store answers."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
    os.environ.update(MASTER_ADDR="127.0.0.2", MASTER_PORT=str(port))
    with ParallelContext.start() as context:
        answers = []
        for host in range(1, 4):
            with socket.socket() as caller:
                answers += [host] if caller.connect_ex((f"127.0.0.{host}", port)) == 0 else []
        assert context.world.gather_objects(context.rank) == [0, 1]
    return answers


def test_the_store_listens_where_the_ranks_meet() -> None:
    assert run_ranks(meet, 2, free_port()) == [[2], [2]]


def test_a_master_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's name of a node need not be one that hosts know."""
    for name, value in (SRUN_TASK | {"MASTER_ADDR": "no host"}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"rank 3 on \S+ finds no address of no host, .*: set MASTER_ADDR to"),
        ParallelContext.start(ParallelConfig(timeouts={"start": 2, "save": 2})),
    ):
        pytest.fail("there is a group")
