"""Runs that bring faults upon themselves, real ones; afterwards the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config

pytestmark = pytest.mark.slow
CASES = {
    "kill@step=4,rank=1": "rank [01] (died|failed)",  # the other one finds its peer gone
    "raise@step=4,rank=0": "debug.inject: a callback raises before step 4",
    "nan@step=4,rank=1": "BadNumbersError: step 4 ",
    "enospc@step=4,rank=0": r"step_00000004 was not written, rank 0 failed: .*No space left on device",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(pretrain_rank, 2, config_of(data, folder / "run"), ds_json(folder, 1))
    return folder / "run"


def config_of(data: dict[str, str], run: Path, *inject: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"training": {"steps": 6}, "checkpoint": {"interval": 2, "keep": 0}}
    return as_data(tiny_config(data, run, debug={"inject": list(inject)}, **sections))


def what_was_learned(run: Path) -> tuple[dict[int, str], dict[str, Any]]:
    """Losses, bit by bit, and digests of the last weights and moments."""
    losses = {step: values["loss"].hex() for step, values in read_log(run).items() if "loss" in values}
    index = checkpoint.checkpoints_folder(run) / "step_00000006" / "index.json"
    files: dict[str, Any] = json.loads(index.read_text())["files"]
    return losses, files


@pytest.mark.parametrize("fault", CASES)
def test_the_same_command_goes_on(
    fault: str, data: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    with pytest.raises(RanksFailedError, match=CASES[fault]):
        run_ranks(pretrain_rank, 2, config_of(data, run, fault), ds_path)
    if fault.startswith(("nan", "enospc")):  # what was asked for before is brought to its end
        assert checkpoint.latest_tag(run) == "step_00000002"
    run_ranks(pretrain_rank, 2, config_of(data, run), ds_path)
    assert what_was_learned(run) == what_was_learned(undisturbed)


def test_a_slow_disk_changes_nothing_and_a_flipped_bit_is_found(
    data: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    faults = ["slow_disk@seconds=0.3,rank=1", "flip@step=4,rank=1"]
    config = config_of(data, run, *faults)
    config["training"]["stop_after"] = 4
    run_ranks(pretrain_rank, 2, config, ds_path)
    folder = checkpoint.checkpoints_folder(run)
    assert checkpoint.latest_tag(run) == "step_00000004"
    checkpoint.verify(folder / "step_00000002")
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors is damaged"):
        checkpoint.verify(folder / "step_00000004")
    run_ranks(pretrain_rank, 2, config_of(data, run), ds_path)
    assert what_was_learned(run) == what_was_learned(undisturbed)
