"""Muon's step of one matrix in one process; tests/distributed has it in parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_iiet.config.optimizers import Muon
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import mark_sharded
from megatron_iiet.training.optimizers import MasterPart
from megatron_iiet.training.optimizers.muon import MuonWithAdamW, orthogonalised

LR = 0.1


def built(weights: list[torch.nn.Parameter], **settings: Any) -> MuonWithAdamW:
    """For matrices that are whole."""
    config = Muon(lr=LR, weight_decay=0.25, **settings)
    groups = [{"params": weights, "weight_decay": config.weight_decay, "muon": True}]
    optimizer = MuonWithAdamW(groups, config)
    for weight in weights:
        mark_sharded(weight, Shard(0, (len(weight),)), 1)
    parts = [MasterPart(w, tuple(w.shape), 0, i, w, 0, w.numel()) for i, w in enumerate(weights)]
    with ParallelContext.start() as context:
        optimizer.connect(weights, parts, context)
    return optimizer


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_it_is_torchs(shape: tuple[int, int], adjust_lr: str) -> None:
    """Which multiplies in bf16, and so is that far away."""
    ours, theirs = (torch.nn.Parameter(drawn(*shape)) for _ in range(2))
    optimizer = built([ours], adjust_lr=adjust_lr, momentum=0.8, matrix_lr_ratio=0.5)
    reference = torch.optim.Muon(
        [theirs], lr=0.5 * LR, weight_decay=0.25, momentum=0.8, adjust_lr_fn=adjust_lr
    )
    for step in range(3):
        before = theirs.detach().clone()
        for weight, stepping in ((ours, optimizer), (theirs, reference)):
            weight.grad = drawn(*shape, seed=step + 1) * 10.0**step
            stepping.step()
        moved = (theirs - before).detach().norm()
        assert (ours - theirs).detach().norm() < 0.02 * moved
        with torch.no_grad():
            theirs.copy_(ours)
    torch.testing.assert_close(
        optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"]
    )


def test_singular_values_become_ones() -> None:
    matrix = drawn(48, 20)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = orthogonalised(matrix, 5, dtype)
        values = torch.linalg.svdvals(found.float())
        assert found.dtype == dtype
        assert 0.65 < values.min() <= values.max() < 1.25
        torch.testing.assert_close(
            found.float(), orthogonalised(1e3 * matrix, 5, dtype).float(), atol=tolerance, rtol=0
        )
    assert not orthogonalised(torch.zeros(4, 6), 5, torch.float32).any()


def test_a_step_left_out_moves_nothing() -> None:
    weight = torch.nn.Parameter(drawn(8, 8))
    optimizer = built([weight])
    found = []
    for gradient, left_out in ((1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        weight.grad = gradient * drawn(8, 8, seed=1)
        optimizer.found_inf = torch.tensor(left_out)  # type: ignore[attr-defined]
        optimizer.step()
        found.append((weight.tolist(), optimizer.state[weight]["momentum_buffer"].tolist()))
    assert found[0] == found[1] == found[2] != found[3]
