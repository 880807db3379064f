"""Learning rate and iterations as functions of the step."""

from __future__ import annotations

import pytest

from megatron_iiet.config import config_from_dict
from megatron_iiet.config.schema import OptimizerConfig
from megatron_iiet.training.schedules import iterations_at, learning_rate


def test_cosine_with_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.1, warmup_fraction=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.55)  # half-way through the cosine
    assert rates[99] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_constant_after_warm_up() -> None:
    config = OptimizerConfig(lr=2.0, warmup_fraction=0.0, schedule="constant")
    assert {learning_rate(config, step, 10) for step in range(10)} == {2.0}


def test_two_stage_schedule() -> None:
    """Three quarters plain Transformer++, the last quarter IIET, as in the paper."""
    config = config_from_dict(
        {
            "model": {"num_layers": 2},
            "solver": {"iterations": 3, "schedule": [[0.75, 0], [0.25, 3]]},
            "training": {"steps": 8},
        }
    )
    assert [iterations_at(config, step) for step in range(8)] == [([0, 0], False)] * 6 + [([3, 3], True)] * 2


def test_without_schedule_per_layer_lists_hold_throughout() -> None:
    config = config_from_dict({"model": {"num_layers": 2}, "solver": {"iterations": [2, 0]}})
    assert iterations_at(config, 0) == iterations_at(config, 999) == ([2, 0], True)


def test_r_0_without_schedule_still_merges() -> None:
    config = config_from_dict({"model": {"num_layers": 2}, "solver": {"iterations": 0}})
    assert iterations_at(config, 0) == ([0, 0], True)
