"""Every ZeRO stage trains the model that plain torch trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config import RunConfig
from megatron_iiet.data.batches import TrainBatches
from megatron_iiet.data.samples import build_splits
from megatron_iiet.models import Transformer
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.schedules import learning_rate
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config

SOLVERS = {
    "euler": {"kind": "euler"},
    "dlcl": {"kind": "dlcl"},
    "iiet": {"kind": "iiet", "iterations": [2, 0, 1]},
    "released": {"kind": "iiet", "variant": "released", "iterations": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def reference(config: RunConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, fp32, plain torch: losses, gradient norms before clipping, final weights."""
    model = Transformer(config)
    model.initialise(config.training.seed)
    decayed = [p for p in model.parameters() if p.dim() >= 2 and not getattr(p, "keep_fp32", False)]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        foreach=False,
    )
    splits = build_splits(config.data.prefix, config.data.sequence_length, config.data.split)
    size = config.training.global_batch_size
    batches = TrainBatches(
        splits.train,
        global_batch_size=size,
        micro_batch_size=size,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=config.training.seed,
    )
    losses, norms = [], []
    for step in range(config.training.steps):
        windows = next(batches)
        optimizer.zero_grad()
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        norms.append(
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping).item()
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.training.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def cases(every: Iterable[tuple[Any, ...]], smoke: set[tuple[Any, ...]]) -> list[Any]:
    """All cases, those outside the smoke subset of `make check` marked slow."""
    return [pytest.param(*case, marks=[] if case in smoke else [pytest.mark.slow]) for case in every]


@pytest.mark.parametrize(
    ("stage", "solver"), cases(itertools.product(range(4), SOLVERS), {(1, "iiet"), (3, "released")})
)
def test_fp32_equals_plain_torch(stage: int, solver: str, data: dict[str, str], tmp_path: Path) -> None:
    """Two ranks, two micro-batches a step, clipping in force, weight decay on matrices only."""
    config = tiny_config(
        data,
        tmp_path / "run",
        solver=SOLVERS[solver],
        optimizer={"weight_decay": 0.1, "gradient_clipping": 0.5},
    )
    weights = run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, stage))[0]
    log = read_log(tmp_path / "run")
    losses, norms, expected = reference(config)
    assert max(norms) > 0.5, "clipping was never in force"
    torch.testing.assert_close([log[s]["loss"] for s in range(1, 9)], losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([log[s]["grad_norm"] for s in range(1, 9)], norms, rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("stage", cases([(1,), (2,), (3,)], {(1,)}))
def test_bf16_follows_fp32(stage: int, data: dict[str, str], tmp_path: Path) -> None:
    """bf16 losses stay near the fp32 reference, and merge coefficients learn below bf16's resolution."""
    config = tiny_config(data, tmp_path / "run", solver=SOLVERS["iiet"], training={"precision": "bf16"})
    weights = run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, stage))[0]
    log = read_log(tmp_path / "run")
    losses, _, _ = reference(config)
    torch.testing.assert_close([log[s]["loss"] for s in range(1, 9)], losses, rtol=0.01, atol=0.01)
    coefficients = weights["layers.2.solver.coefficients"]
    assert coefficients.dtype == torch.float32
    assert not torch.equal(coefficients, coefficients.bfloat16().float())


@pytest.mark.parametrize("recompute", cases([("off",), ("layer",), ("evaluation",)], {("layer",)}))
def test_zero3_with_every_parameter_partitioned(recompute: str, data: dict[str, str], tmp_path: Path) -> None:
    """No parameter is small enough to stay whole: merges and the tied head gather what they read."""
    config = tiny_config(data, tmp_path / "run", solver=SOLVERS["iiet"], training={"recompute": recompute})
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 3, zero_optimization=zero))
    log = read_log(tmp_path / "run")
    losses, _, _ = reference(config)
    torch.testing.assert_close([log[s]["loss"] for s in range(1, 9)], losses, rtol=1e-5, atol=1e-5)
