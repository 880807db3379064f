"""The record of a run's starts: what a line says, and that a crash costs no more than that line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet import __version__
from megatron_iiet.config import ConfigError
from megatron_iiet.config.changes import Change
from megatron_iiet.training import record
from megatron_iiet.training.record import STARTS, append_start, check_output_dir, git_state, read_starts
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


def place(what: str, folder: Path) -> str:
    """An output_dir into which nothing can be written."""
    (folder / "file").write_text("")
    (folder / "link").symlink_to("nowhere")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "other" / "checkpoints").write_text("")
    (folder / "run" / "log.jsonl").mkdir()
    (folder / "kept").mkdir()
    (folder / "kept" / "log.jsonl").symlink_to("/proc/sys/kernel/ostype")  # which root may not write either
    (folder / "events").mkdir()
    (folder / "events" / "tensorboard").write_text("")
    places = {
        "a file": folder / "file",
        "below a file": folder / "file" / "a" / "b",
        "a name that is too long": folder / "new" / ("x" * 300),
        "a link to nowhere": folder / "link",
        "checkpoints is a file": folder / "other",
        "the log is a folder": folder / "run",
        "the log may not be written": folder / "kept",
        "tensorboard is a file": folder / "events",
        "a file system without files": "/proc",
    }
    return str(places[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "a file",
            r"file, where nothing can be written \(/.*/file: Not a directory\); make room for it there",
        ),
        ("below a file", r"file/a/b, where nothing can be written \(/.*/file: Not a directory\)"),
        ("a name that is too long", r"xxx, where nothing can be written \(/.*: File name too long\)"),
        ("a link to nowhere", r"where nothing can be written \(/.*/link: No such file or directory\)"),
        ("checkpoints is a file", r"nothing can be written \(/.*/other/checkpoints: Not a directory\)"),
        ("the log is a folder", r"where /.*/run/log\.jsonl is a folder, not the file that the run writes"),
        ("the log may not be written", r"kept/log\.jsonl cannot be gone on with \(Permission denied\); give"),
        ("tensorboard is a file", r"nothing can be written \(/.*/events/tensorboard: Not a directory\)"),
        ("a file system without files", r"where nothing can be written \(/proc: "),
    ],
)
def test_a_run_that_could_not_be_written(what: str, message: str, tmp_path: Path) -> None:
    output_dir = place(what, tmp_path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"^output_dir is {re.escape(output_dir)}.*") as caught:
        check_output_dir(output_dir)
    assert re.search(message, str(caught.value))
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match=r"where nothing can be written \(.*: Permission denied\)"):
        check_output_dir(tmp_path / "run")


def test_looking_for_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    for output_dir in (tmp_path / "a" / "b", tmp_path / "old", "relative", "old/../new"):
        check_output_dir(output_dir)
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def refusal(config: dict[str, Any], ds_path: Path) -> str:
    """What a rank is told; the second one may not write."""
    if os.environ["RANK"] == "1":
        config["output_dir"] += "/file/run"
    with pytest.raises(ValueError, match="output_dir") as caught:
        pretrain_rank(config, ds_path)
    return str(caught.value)


@pytest.mark.slow
def test_all_ranks_refuse_what_one_cannot_write(tmp_path: Path) -> None:
    """As where a file system is shared by some hosts only; nothing is read or written before."""
    (tmp_path / "file").write_text("")
    config = tiny_config({"prefix": "not there", "tokenizer": "nor this"}, tmp_path)
    told = run_ranks(refusal, 2, as_data(config), ds_json(tmp_path, 1))
    assert told[0] == told[1]
    assert told[0].startswith(f"output_dir is {tmp_path}/file/run, where nothing can be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "zero1.json"]


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
    with (run / STARTS).open("ab") as file:
        file.write(b"\xff\xfe{")  # damage of what is for information must not end a run that saves
    record.copy_starts(run, folder)
    starts, [broken] = read_starts(folder / STARTS)
    assert starts == [{"time": "one"}]
    assert "starts.jsonl (line 2) is not a whole line" in broken


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
