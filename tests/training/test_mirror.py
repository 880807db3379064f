"""Checkpoints that are copied to another file system before they may go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_iiet.config import ConfigError
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.retention import MIRRORED, PINNED, mark, reason_of
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.mirror import Mirror
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.storage.saves import FILE, Saves
from tests.tiny import make_data, tiny_config


def test_what_is_copied_is_a_checkpoint_there(tmp_path: Path) -> None:
    run, away = Saves(tmp_path / "run"), tmp_path / "away"
    mirror = Mirror(f"file://{away}")
    run.save(2)
    mark(run.at(2), PINNED, "here")
    mirror.give(run.at(2))
    mirror.give(run.at(2))
    run.save(4)
    mirror.give(run.at(4))
    assert mirror.finish() == []
    assert (away / "latest").read_text() == "step_00000004\n"
    assert sorted(path.name for path in away.iterdir()) == ["latest", "step_00000002", "step_00000004"]
    for step in (2, 4):
        assert checkpoint.verify(away / f"step_0000000{step}") == 4000
        assert reason_of(run.at(step), MIRRORED) == f"file://{away}"
        assert not (away / f"step_0000000{step}" / MIRRORED).exists()
        assert not (away / f"step_0000000{step}" / PINNED).exists()
    shutil.rmtree(away / "step_00000002")
    again = Mirror(f"file://{away}")
    again.give(run.at(2))
    assert again.finish() == []
    assert not (away / "step_00000002").exists(), "what was copied is copied once"


def test_one_mirror_tries_again(tmp_path: Path) -> None:
    run, away = Saves(tmp_path / "run"), tmp_path / "away"
    run.save(2)
    mirror = Mirror(f"file://{away}")
    (away / "step_00000002").write_text("in the way")
    mirror.give(run.at(2))
    for _ in range(1000):
        if not mirror._given:
            break
        time.sleep(0.01)
    (away / "step_00000002").unlink()
    mirror.give(run.at(2))
    assert len(mirror.finish()) == 1
    assert checkpoint.verify(away / "step_00000002") == 4000


def test_a_copy_that_is_cut_short_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another save of that step was whole before."""
    run, away = Saves(tmp_path / "run"), tmp_path / "away"
    url = f"file://{away}"
    for cut in (False, True):
        run.save(2)
        mirror = Mirror(url)
        if cut:
            monkeypatch.setattr(mirror._fs, "put_file", partial(_fails_at, FILE, mirror._fs.put_file))
        mirror.give(run.at(2))
        assert len(mirror.finish()) == cut
    assert not (away / "step_00000002" / checkpoint.STATE).exists()


def _fails_at(name: str, put: Callable[[str, str], None], here: str, there: str) -> None:
    if here.endswith(name):
        raise OSError("the link is gone")
    put(here, there)


def test_what_is_saved_anew_meanwhile_does_not_count_as_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Saves(tmp_path / "run")
    run.save(2)
    mirror = Mirror(f"file://{tmp_path / 'away'}")
    copy = mirror._copy
    monkeypatch.setattr(mirror, "_copy", lambda folder: (copy(folder), run.save(2)))
    mirror.give(run.at(2))
    assert mirror.finish() == []
    assert reason_of(run.at(2), MIRRORED) is None


def test_a_copy_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    run, away = Saves(tmp_path / "run"), tmp_path / "away"
    run.save(2)
    mirror = Mirror(f"file://{away}")
    (run.at(2) / FILE).rename(tmp_path / FILE)
    (run.at(2) / FILE).symlink_to(tmp_path / "nothing")
    (away / "step_00000002").write_text("in the way")
    mirror.give(run.at(2))
    told = mirror.finish()
    assert len(told) == 1
    assert told[0].startswith(f"{run.at(2)} was not copied to file://{away}: ")
    assert reason_of(run.at(2), MIRRORED) is None
    (away / "step_00000002").unlink()
    (run.at(2) / FILE).unlink()
    (tmp_path / FILE).rename(run.at(2) / FILE)
    again = Mirror(f"file://{away}")
    again.give(run.at(2))
    assert again.finish() == []
    assert checkpoint.verify(away / "step_00000002") == 4000


def test_what_is_not_copied_is_not_removed(tmp_path: Path) -> None:
    run, away = Saves(tmp_path / "run"), tmp_path / "away"
    run.save(2, 4, 6)
    mirror = Mirror(f"file://{away}")
    mirror.give(run.at(2))
    assert mirror.finish() == []
    assert run.prune(1, mirror=mirror.url) == []
    assert run.kept() == ["4", "6"]
    run.prune(1)
    assert run.kept() == ["6"]


@pytest.mark.parametrize("url", ["s3:/bucket/run", "bucket/run", "/data/run", "s3://"])
def test_what_is_no_url_is_no_folder_here(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=f"checkpoint.mirror is {url}, which is no URL; write s3://bucket/run"
    ):
        Mirror(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["nothing://here/run", "file:///proc/nowhere"])
def test_a_place_that_cannot_be_written_to(url: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.mirror is {url}, where nothing can be written "):
        Mirror(url)


@pytest.mark.slow
def test_a_run_is_there_as_a_whole_and_can_go_on_from_there(tmp_path: Path) -> None:
    away = tmp_path / "away"
    keep = {"interval": 2, "keep": 1, "mirror": f"file://{away / 'checkpoints'}"}
    data = make_data(tmp_path)
    config = tiny_config(data, tmp_path / "run", checkpoint=keep, training={"steps": 6})
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 1))
    folder = checkpoint.checkpoints_folder(tmp_path / "run")
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000006"]
    assert checkpoint.complete_tags(away) == ["step_00000002", "step_00000004", "step_00000006"]
    shutil.rmtree(away / "checkpoints" / "step_00000006")
    (away / "checkpoints" / "latest").write_text("step_00000004\n")
    again = tiny_config(data, away, training={"steps": 6})
    run_ranks(pretrain_rank, 2, as_data(again), ds_json(tmp_path, 1))
    assert read_log(away)[6]["loss"] == read_log(tmp_path / "run")[6]["loss"]
