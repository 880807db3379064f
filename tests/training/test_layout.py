"""Stage plans follow each solver's evaluations of F; a run says which solver is in force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.models.pipeline import stage_plan
from megatron_iiet.training.run import Run


def config_of(**solver: Any) -> RunConfig:
    """Eight layers in two stages; the head costs as much as some evaluations of a layer."""
    return config_from_dict(
        {
            "model": {
                "num_layers": 8,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 4,
                "vocab_size": 4096,
            },
            "solver": solver,
            "parallel": {"pipeline": 2},
            "data": {"sequence_length": 16},
        }
    )


def test_stages_weigh_evaluations() -> None:
    """What costs the same is cut the same: the head weighs less, the more often layers are evaluated."""

    def costs(**solver: Any) -> tuple[tuple[float, ...], list[int]]:
        config = config_of(**solver)
        plan = stage_plan(config, Transformer.on_meta(config))
        return plan.costs, [stage.start for stage in plan.stages]

    euler = costs(kind="euler")
    for r, solver in [
        (0, {"kind": "dlcl"}),
        (0, {"kind": "weight-sharing", "repeats": 1}),
        (1, {"kind": "rk2"}),
        (1, {"kind": "rk2", "stage_coefficients": "gated"}),
        (3, {"kind": "rk4"}),
        (3, {"kind": "weight-sharing"}),
        (2, {"kind": "pcformer"}),
        (4, {"kind": "pcformer", "predictor_order": 4}),
    ]:
        iterated = costs(kind="iiet", iterations=r)
        assert costs(**solver) == iterated
        assert (iterated == euler) == (r == 0)
    half = costs(kind="iiet", iterations=3, schedule=[[0.5, 1], [0.5, 3]])
    assert half == costs(kind="pcformer")  # three evaluations on average


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"kind": "euler"}, "solver euler (plain Transformer++)"),
        ({"kind": "euler", "output_norm": "layer"}, "solver euler, LayerNorm of the output"),
        ({"kind": "dlcl"}, "solver dlcl"),
        ({"kind": "weight-sharing"}, "solver weight-sharing, every layer 4 times"),
        ({"kind": "rk2", "stage_coefficients": "gated"}, "solver rk2, gated coefficients"),
        ({"kind": "rk4"}, "solver rk4, learned coefficients"),
        ({"kind": "pcformer", "predictor_order": 4}, "solver pcformer, predictor of order 4"),
        ({"kind": "iiet", "iterations": 2}, "solver iiet, variant paper, r = 2"),
        (
            {"kind": "iiet", "iterations": [0, 1, 2, 3, 3, 2, 1, 0]},
            "solver iiet, variant paper, r = [0, 1, 2, 3, 3, 2, 1, 0]",
        ),
    ],
)
def test_the_solver_in_words(solver: dict[str, Any], words: str) -> None:
    config = config_of(**solver)
    meta_model = Transformer.on_meta(config)
    nothing: Any = None
    run = Run(config, {}, nothing, cast(Any, SimpleNamespace(meta_model=meta_model)), nothing, [], {})
    assert run.describe_solver() == words
    meta_model.set_iterations([0] * 8, merging=False)
    assert run.describe_solver() == "solver euler (plain Transformer++)"
