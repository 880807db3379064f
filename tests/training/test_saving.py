"""Saving where there are checkpoints already: after a kill in the middle, and after going back to one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


def go_back_to(run: Path, step: int) -> None:
    """What a user does who wants to go on from an earlier checkpoint."""
    (checkpoint.checkpoints_folder(run) / "latest").write_text(f"{checkpoint.tag_of(step)}\n")


def losses(run: Path) -> dict[int, str]:
    return {step: values["loss"].hex() for step, values in read_log(run).items() if step}


def pretrain_until_saving(config: dict[str, Any], ds_path: Path, victim: int) -> None:
    """Train; rank ``victim`` dies as it begins to write its part of a checkpoint; the others write theirs."""

    def die(event: str, arguments: Any) -> None:
        if event == "open" and ".safetensors" in str(arguments[0]) and "w" in str(arguments[1]):
            os._exit(9)

    if os.environ["RANK"] == str(victim):
        sys.addaudithook(die)
    pretrain_rank(config, ds_path)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_saves_over_a_checkpoint(
    victim: int, data: dict[str, str], tmp_path: Path
) -> None:
    """What is half replaced is no checkpoint any more; the one before is in force."""
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    config = as_data(tiny_config(data, run, training={"steps": 6}, checkpoint={"interval": 2, "keep": 0}))
    run_ranks(pretrain_rank, 2, config, ds_path)
    expected = losses(run)
    assert export_run(run, 4).state
    go_back_to(run, 2)
    with pytest.raises(RanksFailedError):
        run_ranks(pretrain_until_saving, 2, config, ds_path, victim)
    assert checkpoint.latest_tag(run) == "step_00000002"
    with pytest.raises(ValueError, match="step_00000004"):
        export_run(run, 4)
    assert export_run(run, 6).state, "one that was not written to is whole"
    run_ranks(pretrain_rank, 2, config, ds_path)
    assert losses(run) == expected
    assert export_run(run, 4).state


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_spares_a_checkpoint_older_than_what_is_there(
    keep: int, data: dict[str, str], tmp_path: Path
) -> None:
    """Four checkpoints, a start from the first, and a new second one: by their names two are newer."""
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    sections: dict[str, Any] = {"checkpoint": {"interval": 2, "keep": 0}}
    run_ranks(pretrain_rank, 1, as_data(tiny_config(data, run, **sections)), ds_path)
    go_back_to(run, 2)
    sections = {"checkpoint": {"interval": 2, "keep": keep}, "training": {"stop_after": 4}}
    run_ranks(pretrain_rank, 1, as_data(tiny_config(data, run, **sections)), ds_path)
    assert checkpoint.latest_tag(run) == "step_00000004"
    assert export_run(run).state
