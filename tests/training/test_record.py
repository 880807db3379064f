"""The record of a run's starts: what a line says, and that a crash costs no more than that line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet import __version__
from megatron_iiet.config.changes import Change
from megatron_iiet.training import record
from megatron_iiet.training.record import STARTS, append_start, git_state, read_starts
from megatron_iiet.training.resume import Difference, Resumption
from megatron_iiet.training.summary import summarize_run
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config
from tests.training.bare_run import alone


def test_half_a_line_is_left_out_and_told(tmp_path: Path) -> None:
    append_start(tmp_path, {"time": "one"})
    path = tmp_path / STARTS
    with path.open("a") as file:
        file.write('{"time": "tw')
    append_start(tmp_path, {"time": "three"})
    starts, broken = read_starts(path)
    assert [start["time"] for start in starts] == ["one", "three"]
    assert broken == [f"{path} (line 2) is not a whole line; it is left out"]
    assert read_starts(tmp_path / "nowhere") == ([], [])


def test_a_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts at once do not mix their lines; and it is on disk."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    append_start(tmp_path, {"time": "x" * 100_000})
    assert len(synced) == 2, "the file and its folder"
    assert (tmp_path / STARTS).read_text().count("\n") == 1


def git(folder: Path, *words: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *names, *words], check=True, capture_output=True, text=True
    ).stdout


def test_the_state_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1\n")
    assert git_state(package) == (None, None)
    git(tmp_path, "init", "-q")
    assert git_state(package) == (None, None), "files that git does not know are of no commit"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_state(package) == (commit, False)
    (tmp_path / "untracked").write_text("")
    assert git_state(package) == (commit, False)
    (package / "code.py").write_text("2\n")
    assert git_state(package) == (commit, True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    assert git_state(package) == (commit, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(package) == (None, None)


def test_a_host_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context = alone()
    monkeypatch.setattr(context.world, "gather_objects", lambda name: ["b", "b", "a", "b", "a"])
    assert record.start_of(context, {"tensor": 1}, None)["hosts"] == ["b", "a"]


def test_a_start_says_what_it_goes_on_from_and_what_has_changed() -> None:
    assert [record.start_of(alone(), {}, None)[key] for key in ("resumed_step", "changed", "accepted")] == [
        None,
        [],
        [],
    ]
    changed, accepted = (
        [Difference(key, 1, 2, change)]
        for key, change in (("optimizer.lr", Change.COURSE), ("training.seed", Change.ORDER))
    )
    state = SimpleNamespace(step=7)
    start = record.start_of(alone(3), {"tensor": 1}, Resumption(Path(), cast(Any, state), changed, accepted))
    assert start["resumed_step"] == 7
    assert start["changed"] == [{"key": "optimizer.lr", "old": 1, "new": 2}]
    assert start["accepted"] == [{"key": "training.seed", "old": 1, "new": 2}]
    assert start["layout"] == {"world_size": 3, "tensor": 1}


def test_the_configuration_of_a_run_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    """A missing one, and another one, are replaced; the same one is not written again."""
    run, folder = tmp_path / "run", tmp_path / "checkpoint"
    run.mkdir()
    folder.mkdir()
    (folder / "config.yaml").write_text("as saved")
    for before in (None, "another"):
        if before:
            (run / "config.yaml").write_text(before)
        record.restore_configuration(run, folder)
        assert (run / "config.yaml").read_text() == "as saved"
    written = (run / "config.yaml").stat()
    record.restore_configuration(run, folder)
    assert (run / "config.yaml").stat().st_ino == written.st_ino


def test_a_checkpoint_has_the_starts_so_far(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "checkpoint"
    run.mkdir()
    folder.mkdir()
    record.copy_starts(run, folder)
    assert not list(folder.iterdir())
    append_start(run, {"time": "one"})
    record.copy_starts(run, folder)
    assert read_starts(folder / STARTS) == ([{"time": "one"}], [])


@pytest.mark.slow
def test_what_a_start_says(tmp_path: Path) -> None:
    """Of two ranks, one of which writes; then of one that goes on from there."""
    data = make_data(tmp_path)
    for ranks, stop in ((2, 2), (1, None)):
        config = tiny_config(data, tmp_path / "run", training={"stop_after": stop, "steps": 4})
        run_ranks(pretrain_rank, ranks, as_data(config), ds_json(tmp_path, 1))
    starts, _ = read_starts(tmp_path / "run" / STARTS)
    first, second = starts
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert first["git"] == dict(
        zip(("commit", "dirty"), git_state(Path(record.__file__).parent), strict=True)
    )
    versions = dict(first["versions"])
    assert versions.pop("deepspeed")[0].isdigit()
    assert versions == {
        "megatron_iiet": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    assert first["hosts"] == [os.uname().nodename]
    layouts: list[dict[str, Any]] = [
        {"world_size": ranks, "tensor": 1, "pipeline": 1, "data": ranks, "zero_stage": 1} for ranks in (2, 1)
    ]
    assert [start["layout"] for start in starts] == layouts
    assert [start["resumed_step"] for start in starts] == [None, 2]
    assert first["changed"] == first["accepted"] == second["changed"] == second["accepted"] == []
    copy = tmp_path / "run" / "checkpoints" / "step_00000004" / STARTS
    assert [json.loads(line) for line in copy.read_text().splitlines()] == starts
    said = summarize_run(tmp_path / "run").splitlines()[-1]
    assert said.startswith(f"started 2 x, last {second['time']} from step 2, ")
    assert said.endswith("on 1 process(es)")
    with (tmp_path / "run" / STARTS).open("a") as file:
        file.write("{")
    assert "starts.jsonl (line 3) is not a whole line" in summarize_run(tmp_path / "run")
