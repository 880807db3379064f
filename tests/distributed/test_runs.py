"""Whole runs, as a user starts them, in other layouts: training, validation between steps, the switch of
two-stage training, diagnostics, checkpoints, resuming. Their logs are the log of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_iiet import models
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, tiny_config, validation_loss

TWO_STAGE = {"kind": "iiet", "iterations": 2, "schedule": [[0.5, 0], [0.5, 2]], "coefficient_init": "average"}
SECTIONS: dict[str, dict[str, Any]] = {
    "solver": TWO_STAGE,
    "evaluation": {"interval": 3, "samples": 11},
    "checkpoint": {"interval": 3, "keep": 0},
    "optimizer": {"lr": 1e-2, "eps": 1e-4},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "tensor": (2, {"tensor": 2}, 1),
    "sequence": (2, {"tensor": 2, "sequence": True}, 3),
    "pipeline": (2, {"pipeline": 2}, 1),
    "pipeline x data": (4, {"pipeline": 2}, 1),
    "pipeline 3": (3, {"pipeline": 3}, 0),
    "all": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """The log of one process."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(pretrain_rank, 1, as_data(tiny_config(data, folder / "run", **SECTIONS)), ds_json(folder, 1))
    return read_log(folder / "run")


def assert_same(
    found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]], kinds: str
) -> None:
    """The values whose names start with one of ``kinds`` agree in every step."""
    prefixes = tuple(kinds.split())

    def chosen(log: dict[int, dict[str, float]]) -> dict[tuple[int, str], float]:
        return {(s, k): v for s, values in log.items() for k, v in values.items() if k.startswith(prefixes)}

    assert chosen(expected)
    assert chosen(found) == pytest.approx(chosen(expected), rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *long_but(["pipeline", "pipeline x data", "all", "tensor", "sequence", "pipeline 3"], "all"),
    ],
)
def test_log_is_the_one_of_one_process(
    name: str, data: dict[str, str], expected: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    """Twice: in one go, and stopped after the switch and resumed."""
    world_size, parallel, stage = LAYOUTS[name]
    sections = {**SECTIONS, "parallel": parallel}
    whole = tiny_config(data, tmp_path / "whole", **sections)
    run_ranks(pretrain_rank, world_size, as_data(whole), ds_json(tmp_path, stage))
    for stop in (5, None):
        part = tiny_config(data, tmp_path / "parts", **{**sections, "training": {"stop_after": stop}})
        run_ranks(pretrain_rank, world_size, as_data(part), ds_json(tmp_path, stage))
    log = read_log(tmp_path / "whole")
    assert_same(log, expected, "loss grad_norm lr validation_loss coefficient_norm")
    if name.startswith("pipeline") and "data" not in name:  # elsewhere a rank sees a part of the tokens
        assert_same(log, expected, "relative_residual influence")
    resumed = read_log(tmp_path / "parts")
    assert [v["loss"].hex() for s, v in resumed.items() if s] == [
        v["loss"].hex() for s, v in log.items() if s
    ]


CPU = {"device": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "zero"),
    [
        ({}, {"stage": 1, "offload_optimizer": CPU}),
        ({"tensor": 2, "sequence": True}, {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}),
        *long_but(
            [
                ({"tensor": 2}, {"stage": 2, "offload_optimizer": CPU}),
                ({"pipeline": 2}, {"stage": 1, "offload_optimizer": CPU}),
            ]
        ),
    ],
    ids=str,
)
def test_offload(
    parallel: dict[str, Any],
    zero: dict[str, Any],
    data: dict[str, str],
    expected: dict[int, dict[str, float]],
    tmp_path: Path,
) -> None:
    """Optimizer and parameters in CPU memory; stopped and resumed on the way."""
    for stop in (5, None):
        sections = {**SECTIONS, "parallel": parallel, "training": {"stop_after": stop}}
        config = tiny_config(data, tmp_path / "run", **sections)
        run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, zero["stage"], zero_optimization=zero))
    assert_same(read_log(tmp_path / "run"), expected, "loss grad_norm lr validation_loss")


@pytest.mark.slow
def test_a_run_that_changes_its_layout_at_every_stop(
    data: dict[str, str], expected: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    """The same output_dir, other processes: what a user does whose allocation shrinks and grows."""
    for stop, (world_size, parallel, stage) in zip(
        (2, 3, 5, 6, None),
        (
            (2, {"tensor": 2}, 3),
            (4, {"pipeline": 2, "tensor": 2}, 1),
            (1, {}, 0),
            (2, {"pipeline": 2}, 0),
            (2, {}, 2),
        ),
        strict=True,
    ):
        sections = {**SECTIONS, "parallel": parallel, "training": {"stop_after": stop}}
        config = tiny_config(data, tmp_path / "run", **sections)
        run_ranks(pretrain_rank, world_size, as_data(config), ds_json(tmp_path, stage))
    log = read_log(tmp_path / "run")
    assert_same(log, expected, "loss grad_norm lr validation_loss")
    exported = export_run(tmp_path / "run")
    models.save(exported.config, exported.state, tmp_path / "model")
    assert validation_loss(models.load(tmp_path / "model")) == pytest.approx(
        log[8]["validation_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_a_checkpoint_of_another_precision_is_continued(data: dict[str, str], tmp_path: Path) -> None:
    for stop, precision in ((4, "fp32"), (None, "bf16")):
        training = {"stop_after": stop, "precision": precision}
        config = tiny_config(data, tmp_path / "run", training=training)
        run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    whole = tiny_config(data, tmp_path / "whole", training={"precision": "fp32"})
    run_ranks(pretrain_rank, 1, as_data(whole), ds_json(tmp_path, 1))
    log, expected = read_log(tmp_path / "run"), read_log(tmp_path / "whole")
    assert [log[s]["loss"] for s in range(1, 5)] == [expected[s]["loss"] for s in range(1, 5)]
    for step in range(5, 9):
        assert log[step]["loss"] == pytest.approx(expected[step]["loss"], rel=5e-3)
        assert log[step]["loss"] != expected[step]["loss"], "not bf16"
