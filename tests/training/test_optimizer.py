"""What AdamW is given: which parameters decay, and its settings."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_iiet.config import config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.training.optimizers import prepare_optimizer

MATRICES = ("embedding.weight", "head.weight", "qkv.weight", "output.weight", "gate_up.weight", "down.weight")


@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "iiet", "iterations": 1},
        {"kind": "iiet", "variant": "released", "iterations": 1},
        {"kind": "rk2", "stage_coefficients": "gated"},
        {"kind": "pcformer"},
    ],
    ids=lambda solver: solver.get("variant", solver["kind"]),
)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(solver: dict[str, Any], tied: bool) -> None:
    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 2, "num_attention_heads": 2}
    family = {"attention_bias": "qkvo", "qk_norm": True}
    config = config_from_dict(
        {
            "model": {**sizes, "vocab_size": 60, "tie_embeddings": tied, **family},
            "solver": solver,
            "optimizer": {"lr": 3e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.25},
        }
    )
    model = Transformer(config)
    prepared = prepare_optimizer(model, config.optimizer)
    assert set(prepared.moments) == set(model.parameters())
    optimizer = prepared.build(prepared.groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {name: 0.25 if name.endswith(MATRICES) else 0.0 for name in names.values()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.99), 1e-7)
        assert len({getattr(p, "keep_fp32", False) for p in group["params"]}) == 1, "a group has one type"
