"""Learning rate and iterations as functions of the step, and training in stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.config.optimizers import OptimizerConfig
from megatron_iiet.config.solvers import Euler, Iterating
from megatron_iiet.models.iterations import iterations_at, mean_evaluations
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.schedules import learning_rate
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, read_full, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def staged(layers: int, steps: int, *stages: list[Any]) -> RunConfig:
    return config_from_dict(
        {
            "model": {"num_layers": layers},
            "solver": {"iterations": stages[-1][1], "schedule": list(stages)},
            "training": {"steps": steps},
        }
    )


def test_cosine_with_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.1, warmup_fraction=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.55)  # half-way through the cosine
    assert rates[99] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_cosine_is_what_it_was() -> None:
    """To the bit: resumed runs go on with the same rates."""
    config = OptimizerConfig(lr=3e-4, min_lr_ratio=0.1, warmup_fraction=0.05)
    for step in range(50, 1000):
        progress = (step - 50 + 1) / 950
        low = 3e-4 * 0.1
        expected = low + (3e-4 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        assert learning_rate(config, step, 1000) == expected


def test_linear_after_warm_up() -> None:
    config = OptimizerConfig(lr=1.0, min_lr_ratio=0.2, warmup_fraction=0.2, schedule="linear")
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_warm_up_stable_decay() -> None:
    config = OptimizerConfig(
        lr=1.0, min_lr_ratio=0.0, warmup_fraction=0.2, schedule="wsd", decay_fraction=0.4
    )
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    extended = [learning_rate(config, step, 20) for step in range(20)]
    assert extended[4:12] == [1.0] * 8  # from step 6 of the first on: as if there had always been 20
    without = OptimizerConfig(lr=1.0, warmup_fraction=0.0, schedule="wsd", decay_fraction=0.0)
    assert {learning_rate(without, step, 10) for step in range(10)} == {1.0}


def test_constant_after_warm_up() -> None:
    config = OptimizerConfig(lr=2.0, warmup_fraction=0.0, schedule="constant")
    assert {learning_rate(config, step, 10) for step in range(10)} == {2.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_last_step_has_arrived_however_few_there_are(schedule: str, steps: int) -> None:
    for warmup in range(steps):
        config = OptimizerConfig(
            lr=1.0,
            min_lr_ratio=0.25,
            schedule=schedule,  # type: ignore[arg-type]
            warmup_fraction=warmup / steps,
            decay_fraction=1 / steps,
        )
        rates = [learning_rate(config, step, steps) for step in range(steps)]
        assert rates[-1] == pytest.approx(0.25)
        assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


def test_two_stage_schedule() -> None:
    """Three quarters plain Transformer++, the last quarter IIET, as in the paper."""
    config = staged(2, 8, [0.75, 0], [0.25, 3])
    assert [iterations_at(config, step) for step in range(8)] == [([0, 0], False)] * 6 + [([3, 3], True)] * 2


def test_stages_with_iterations_per_layer() -> None:
    """A layer with r = 0 merges where others iterate; only a stage without any iteration is Transformer++."""
    config = staged(2, 10, [0.3, [0, 0]], [0.3, [0, 1]], [0.15, 0], [0.25, [2, 1]])
    assert [iterations_at(config, step) for step in (0, 2, 3, 5, 6, 7, 8, 9, 10)] == [
        *[([0, 0], False)] * 2,
        *[([0, 1], True)] * 2,
        *[([0, 0], False)] * 2,
        *[([2, 1], True)] * 3,  # step 10: a validation after the last
    ]


def test_switches_are_at_the_nearest_step() -> None:
    third = 1 / 3
    config = staged(1, 10, [third, 0], [third, 1], [third, 2])
    assert [iterations_at(config, step)[0][0] for step in range(10)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_mean_evaluations_are_each_layer_s() -> None:
    config = staged(3, 10, [0.5, 0], [0.25, [0, 2, 4]], [0.25, [3, 0, 0]])
    assert mean_evaluations(config) == [1.75, 1.5, 2.0]


def test_without_schedule_per_layer_lists_hold_throughout() -> None:
    config = config_from_dict({"model": {"num_layers": 2}, "solver": {"iterations": [2, 0]}})
    assert iterations_at(config, 0) == iterations_at(config, 999) == ([2, 0], True)


def test_r_0_without_schedule_still_merges() -> None:
    config = config_from_dict({"model": {"num_layers": 2}, "solver": {"iterations": 0}})
    assert iterations_at(config, 0) == ([0, 0], True)


# --- runs ---

STAGES = {
    "kind": "iiet",
    "iterations": [1, 0, 2],
    "schedule": [[0.375, 0], [0.375, [0, 2, 1]], [0.25, [1, 0, 2]]],
    "coefficient_init": "average",
}
"""Of 8 steps: switches before steps 3 and 6."""
DECAY = {"lr": 1e-2, "weight_decay": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unused_coefficients_rest(stage: int, data: dict[str, str], tmp_path: Path) -> None:
    """Values, first and second moments, under decay and gradient clipping, in each ZeRO stage's buffers."""
    config = tiny_config(data, tmp_path / "run", solver=STAGES, optimizer=DECAY, training={"stop_after": 3})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, stage))
    folder = checkpoint.checkpoints_folder(tmp_path / "run") / "step_00000003"
    with checkpoint.open_weights(folder) as reader:
        for n in range(3):
            name = f"layers.{n}.solver.coefficients"
            assert torch.equal(read_full(reader, name), torch.full((n + 1,), 1 / (n + 1)))
            assert not read_full(reader, name, "exp_avg").any()
            assert not read_full(reader, name, "exp_avg_sq").any()
        assert read_full(reader, "norm.weight", "exp_avg_sq").all()


def history(folder: Path) -> dict[int, tuple[str, ...]]:
    """What a run logged of its steps, in hexadecimal."""
    return {
        step: tuple(
            values[key].hex() for key in ("loss", "grad_norm", "lr", "validation_loss") if key in values
        )
        for step, values in read_log(folder).items()
    }


LAYOUTS: dict[str, tuple[int, dict[str, int], int]] = {
    "no zero": (1, {}, 0),
    "zero 1": (1, {}, 1),
    "pipeline": (2, {"pipeline": 2}, 1),
    "pipeline, no zero": (2, {"pipeline": 2}, 0),
    "zero 3": (2, {}, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    long_but(["zero 1", "pipeline", "no zero", "pipeline, no zero", "zero 3"], "zero 1"),
)
def test_resumed_in_and_at_a_switch(name: str, data: dict[str, str], tmp_path: Path) -> None:
    """To the bit the run without stops, whose stages change what crosses a pipeline's boundary."""
    world_size, parallel, zero = LAYOUTS[name]
    sections: dict[str, Any] = {
        "solver": STAGES,
        "optimizer": DECAY,
        "parallel": parallel,
        "evaluation": {"interval": 3, "samples": 8},
    }

    def run(folder: Path, stop: int | None = None, **other: dict[str, Any]) -> None:
        config = tiny_config(data, folder, **{**sections, "training": {"stop_after": stop}, **other})
        run_ranks(pretrain_rank, world_size, as_data(config), ds_json(tmp_path, zero))

    run(tmp_path / "whole")
    for stop in (2, 3, 6, 7, None):
        run(tmp_path / "parts", stop)
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    assert {step: values[:3] for step, values in parts.items() if step} == {
        step: values[:3] for step, values in whole.items() if step
    }
    assert whole[8] == parts[8]
    one, other = (export_run(tmp_path / folder).state for folder in ("whole", "parts"))
    assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)
    assert export_run(tmp_path / "whole").config.solver.iterations == [1, 0, 2]


@pytest.mark.slow
def test_learning_rate_and_samples_know_nothing_of_stages(data: dict[str, str], tmp_path: Path) -> None:
    """They are those of a run without schedule, whose solver is a stage's all the time."""
    always = {**STAGES, "iterations": 0, "schedule": None}
    logs = []
    for name, solver in (("staged", STAGES), ("always", always)):
        config = tiny_config(data, tmp_path / name, solver=solver, checkpoint={"interval": 1, "keep": 0})
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
        states = [
            checkpoint.read_state(folder).data
            for folder in sorted(checkpoint.checkpoints_folder(tmp_path / name).glob("step_*"))
        ]
        logs.append(([values.get("lr") for values in read_log(tmp_path / name).values()], states))
    assert logs[0] == logs[1]
    assert len(logs[0][1]) == 8


@pytest.mark.slow
def test_export_in_each_stage(data: dict[str, str], tmp_path: Path) -> None:
    """A checkpoint's configuration has the iterations of the stage it ended."""
    config = tiny_config(data, tmp_path / "run", solver=STAGES, checkpoint={"interval": 1, "keep": 0})
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    found = []
    for step in range(1, 9):
        exported = export_run(tmp_path / "run", step)
        solver = exported.config.solver
        assert any(".solver." in name for name in exported.state) == isinstance(solver, Iterating)
        if isinstance(solver, Iterating):
            assert solver.schedule is None
            found.append(solver.iterations)
        else:
            assert solver == Euler()  # and no key of the other kind
            found.append(solver.kind)
    assert found == ["euler"] * 3 + [[0, 2, 1]] * 3 + [[1, 0, 2]] * 2
