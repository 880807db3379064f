"""Collectives of a group of ranks against arithmetic in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import sum_in_fp32
from tests.distributed.harness import run_ranks

SIZE = 4


def collectives(values: Tensor) -> dict[str, Tensor]:
    """Of this rank's row of ``values``, [ranks, ranks, 3]."""
    with ParallelContext.start(ParallelConfig(tensor=SIZE)) as context:
        group = context.tensor
        own = values[group.rank]
        mean = group.mean(own.clone())
        part, work = group.reduce_scatter(own.clone(), asynchronous=True)
        work.wait()
        gathered = group.all_gather(own)
        names = group.gather_objects(f"rank {group.rank}")
        assert names == [f"rank {rank}" for rank in range(SIZE)]
        return {"mean": mean, "part": part, "gathered": gathered}


def half_precision_sum(values: Tensor) -> Tensor:
    with ParallelContext.start(ParallelConfig(tensor=SIZE)) as context:
        own = values[context.tensor.rank]
        kept = own.clone()
        total = sum_in_fp32(own, context.tensor)
        assert torch.equal(own, kept), "the summand was written over"
        return total


@pytest.mark.slow
def test_collectives() -> None:
    values = torch.randn(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
    for rank, found in enumerate(run_ranks(collectives, SIZE, values)):
        torch.testing.assert_close(found["mean"], values.mean(0))
        torch.testing.assert_close(found["part"], values.sum(0)[rank])
        assert torch.equal(found["gathered"], values)


@pytest.mark.slow
def test_a_sum_is_rounded_once() -> None:
    """1 and three times 0.0015: alone or in pairs, what is added to 1 is less than half of bf16's step there,
    so that a sum in bf16 stays 1 in whatever order, unless the 1 comes last; which it does for one column."""
    values = torch.full((SIZE, SIZE), 0.0015, dtype=torch.bfloat16).fill_diagonal_(1.0)
    assert (values[0, 0] + values[0, 1] + values[0, 2] + values[0, 3]).item() == 1.0
    expected = values.double().sum(0).bfloat16()
    assert expected.tolist() == [1.0078125] * SIZE
    for found in run_ranks(half_precision_sum, SIZE, values):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
