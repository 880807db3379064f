"""Saving where there are checkpoints already: after a kill in the middle, and after going back to one."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megatron_iiet.config import LoadedConfig, config_from_dict
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.checkpoint_model import export_run
from megatron_iiet.storage.fragments import MASTER, Fragment, FragmentReader, place_of
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from megatron_iiet.training.run import Run
from megatron_iiet.training.saving import HostCopies, Saving, has_room
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, read_full, tiny_config
from tests.training.bare_run import alone

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
        if event == "open" and ".safetensors" in str(arguments[0]) and {*"wx"} & {*str(arguments[1])}:
            os._exit(9)

    if os.environ["RANK"] == str(victim):
        sys.addaudithook(die)
    pretrain_rank(config, ds_path)


@pytest.mark.parametrize("victim", long_but([0, 1], 0))
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


@pytest.mark.parametrize("keep", long_but([1, 2], 1))
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


# --- while training goes on ---


def test_a_save_holds_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Weights change while it is written; it counts once the commit is through."""
    weight, place = torch.arange(1000.0), place_of(None, (1000,), Group())
    save, folder, go_on = SaveIdentity.draw(4, "config"), tmp_path / "step_00000004", threading.Event()

    def commit() -> list[str]:
        go_on.wait()
        return ["a warning"]

    copies = HostCopies()
    fragments = [Fragment("weight", place, 1000, {MASTER: weight})]
    saving = Saving(alone(), folder, save, copies.take(fragments), commit)
    weight.fill_(-1.0)
    saving._task.join()
    assert not saving.advance(), "its files are there, but it is no checkpoint yet"
    assert not saving.advance(), "nobody waits for the commit"
    go_on.set()
    saving.finish()
    assert saving.warnings == ["a warning"]
    with FragmentReader(folder, save) as reader:
        assert torch.equal(read_full(reader, "weight"), torch.arange(1000.0))
    again = copies.take(fragments)[0].tensors[MASTER]
    assert again.data_ptr() == copies.take(fragments)[0].tensors[MASTER].data_ptr(), "memory grows"
    assert torch.equal(again, weight)
    shorter = Fragment("weight", place_of(None, (10,), Group()), 10, {MASTER: torch.arange(10.0)})
    assert torch.equal(copies.take([shorter])[0].tensors[MASTER], torch.arange(10.0))


def test_nothing_is_in_force_before_all_ranks_have_written(tmp_path: Path) -> None:
    saving = Saving(alone(2), tmp_path / "step_00000004", SaveIdentity.draw(4, "config"), [])
    for _ in range(3):
        saving._task.join()
        assert not saving.advance(), "the other rank writes for ever"


def test_a_disk_that_takes_too_long_ends_the_run(tmp_path: Path) -> None:
    """And one that has just come through in time does not, however late that is looked at."""
    save, go_on = SaveIdentity.draw(4, "config"), threading.Event()

    def hang() -> None:
        go_on.wait()

    saving = Saving(alone(), tmp_path / "step_00000004", save, [], before=hang, seconds=0.0)
    with pytest.raises(
        OSError, match=r"rank 0 failed: its disk took longer than 0 s \(parallel\.timeouts\.save"
    ):
        saving.advance()
    go_on.set()
    saving.finish()


def test_copies_want_room(monkeypatch: pytest.MonkeyPatch) -> None:
    fragment = Fragment("weight", place_of(None, (1000,), Group()), 1000, {MASTER: torch.zeros(1000)})
    for free, lack in ((8000, ""), (7999, "has 0.0 GiB of memory free, of which copies would take 0.0")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert has_room(alone(), [fragment]).endswith(lack)
        assert bool(has_room(alone(), [fragment])) == bool(lack)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    two_of_a_host = SimpleNamespace(world=SimpleNamespace(gather_objects=lambda view: [view, view]))
    assert has_room(two_of_a_host, [fragment]), "each has room, but not both"  # type: ignore[arg-type]


def pretrain_short_of_room(config: dict[str, Any], ds_path: Path, victim: int) -> None:
    """Train; rank ``victim`` may write no file larger than 2 KiB once it has taken a step."""

    def limit(run: Run) -> None:
        if os.environ["RANK"] == str(victim) and run.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

    enter = Run.enter_stage  # before every step
    Run.enter_stage = lambda run: (limit(run), enter(run))[1]  # type: ignore[method-assign]
    pretrain_rank(config, ds_path)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_write_that_fails_ends_the_run_with_its_reason(
    mode: str, data: dict[str, str], tmp_path: Path
) -> None:
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    checkpoints = {"interval": 2, "keep": 0, "mode": mode}
    config = as_data(tiny_config(data, run, training={"steps": 6}, checkpoint=checkpoints))
    with pytest.raises(
        RanksFailedError,
        match=r"OSError: the checkpoint .*step_00000004 was not written, rank 1 failed: .*large",
    ):
        run_ranks(pretrain_short_of_room, 2, config, ds_path, 1)
    assert checkpoint.latest_tag(run) == "step_00000002"
    run_ranks(pretrain_rank, 2, config, ds_path)
    whole = tmp_path / "whole"
    undisturbed = tiny_config(data, whole, training={"steps": 6}, checkpoint={"interval": 3, "mode": "sync"})
    run_ranks(pretrain_rank, 2, as_data(undisturbed), ds_path)
    assert losses(run) == losses(whole)
    digests = [
        json.loads((checkpoint.checkpoints_folder(each) / "step_00000006" / "index.json").read_text())[
            "files"
        ]
        for each in (run, whole)
    ]
    assert digests[0] == digests[1], "what was written while training went on differs"


def save_poisoned(config: dict[str, Any], ds_path: Path) -> str:
    """What every rank is told that saves what another one has spoilt."""
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, _ = prepare(loaded.config, ds_config, context)
        if context.rank == 1:
            next(f for f in run.engine.fragments() if f.numel).tensors["exp_avg_sq"][-1] = math.inf
        with pytest.raises(FloatingPointError) as caught:
            run.save()
        run.close()
        return str(caught.value)


def test_what_is_no_finite_number_is_not_saved(data: dict[str, str], tmp_path: Path) -> None:
    config = as_data(tiny_config(data, tmp_path / "run"))
    told = run_ranks(save_poisoned, 2, config, ds_json(tmp_path, 1))
    assert told[0] == told[1]
    assert re.match(r"step 0 is not saved: exp_avg_sq of \S+ of rank 1 hold NaN or infinity; ", told[0])
    assert not checkpoint.checkpoints_folder(tmp_path / "run").exists()
