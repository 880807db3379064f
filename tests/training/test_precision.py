"""In bf16 the merge coefficients that a forward pass reads stay fp32, wherever a ZeRO stage allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parallel", "coefficients"),
    [
        (0, {"pipeline": 2}, torch.float32),
        (2, {"tensor": 2}, torch.float32),
        (3, {}, torch.bfloat16),
        *long_but([(1, {"pipeline": 2}, torch.float32), (1, {}, torch.float32)]),
    ],
    ids=str,
)
def test_types_of_working_copies(
    stage: int, parallel: dict[str, Any], coefficients: torch.dtype, data: dict[str, str], tmp_path: Path
) -> None:
    training = {"steps": 2, "precision": "bf16"}
    config = tiny_config(data, tmp_path / "run", parallel=parallel, training=training)
    found: dict[str, torch.dtype] = {}
    for weights in run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, stage)):
        found |= {name: weight.dtype for name, weight in weights.items()}
    solvers = {name for name in found if ".solver." in name}
    assert solvers == {f"layers.{n}.solver.coefficients" for n in range(3)}
    assert {found[name] for name in solvers} == {coefficients}
    assert {dtype for name, dtype in found.items() if name not in solvers} == {torch.bfloat16}
