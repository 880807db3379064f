"""Ranks that do not see the same folder train on from nothing: the one that sees another is named."""

from __future__ import annotations

import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iiet.config import ConfigError
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training import agreement
from megatron_iiet.training.agreement import Succession, check_shared
from tests.distributed.harness import run_ranks
from tests.storage.saves import Saves
from tests.training.bare_run import alone


def look(folders: list[str]) -> tuple[str, list[str]]:
    """What a start finds in this rank's folder: the refusal, the checkpoints."""
    agreement.PATIENCE_SECONDS = 0.5
    with ParallelContext.start() as context:
        os.chdir(Path(folders[context.rank]).parent)  # where the folder lies differs, its name does not
        name = Path(folders[context.rank]).name
        try:
            succession = Succession(name, context)
            newest = succession.newest()
            check_shared(name, context)
        except ConfigError as error:
            return str(error), []
        return "", [newest.name if newest else "scratch", *succession.candidates.tags]


def views(*folders: Path) -> list[tuple[str, list[str]]]:
    return run_ranks(look, len(folders), [str(folder) for folder in folders])


class Other:
    """A world of two, in which the other rank's view is what it is told to be, and a clock by hand."""

    def __init__(self, view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 0.0, list[float]()
        clock = SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep)
        monkeypatch.setattr(agreement, "time", clock)
        gather = lambda own: [own, view(own)]  # noqa: E731
        world = SimpleNamespace(gather_objects=gather, all_reduce=lambda x: None, size=2)
        self.context = cast(ParallelContext, replace(alone(2), world=world))  # type: ignore[arg-type]

    def monotonic(self) -> float:
        self.now += 0.01  # it passes without sleep, too
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_folder_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At rest, and not for ever."""
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 10 * agreement._POLL_SECONDS)
    other = Other(lambda own: (own[0], {} if other.now < 3 else own[1], *own[2:]), monkeypatch)
    agreement._compare_views(str(tmp_path), [], other.context)
    assert other.slept == []
    views = iter([{"latest": "x"}, {"latest": "x"}, {}])
    other = Other(lambda own: (own[0], next(views), *own[2:]), monkeypatch)
    agreement._compare_views(str(tmp_path), [], other.context)
    assert other.slept == [agreement._POLL_SECONDS] * 2
    never = Other(lambda own: (own[0], {"latest": "x"}, *own[2:]), monkeypatch)
    with pytest.raises(
        ConfigError, match=r"sees no latest there, but rank 1 on .* a 'latest' that names 'x'"
    ):
        agreement._compare_views(str(tmp_path), [], never.context)
    assert 5 < len(never.slept) <= 10

    monkeypatch.setattr(Path, "exists", lambda path, **_: not path.name.startswith(".probe-") or appeared())
    appearing = iter([False, False, True])
    appeared = lambda: next(appearing)  # noqa: E731
    seen = Other(lambda own: own, monkeypatch)
    check_shared(str(tmp_path), seen.context)
    assert seen.slept == [agreement._POLL_SECONDS] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saves = Saves(tmp_path / "one" / "run")
    saves.save(5, 10)
    return saves.output_dir


def test_one_folder(run: Path) -> None:
    expected = ("", ["step_00000010", "step_00000010", "step_00000005"])
    assert views(run, run) == [expected, expected]


@pytest.mark.slow
def test_ranks_with_other_views_are_named(run: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    copy = tmp_path / "two" / "run"
    checkpoints = copy / "checkpoints"
    expected = {}
    shutil.copytree(run, copy)
    (checkpoints / "latest").write_text("step_00000005\n")
    expected["an older latest"] = r"sees a 'latest' that names 'step_00000010', but rank 1 on HOST a 'latest'"
    (found, _), (other, _) = views(run, copy)
    assert found == other
    assert re.search(expected["an older latest"].replace("HOST", host), found), found

    (checkpoints / "latest").write_text("step_00000010\n")
    shutil.rmtree(checkpoints / "step_00000010")
    Saves(copy).save(10)
    (found, _), _ = views(run, copy)
    assert re.search(f"sees a step_00000010 whose state has digest .*, but rank 1 on {host} a step", found)

    shutil.rmtree(copy)
    (found, _), _, _ = views(run, run, copy)
    assert re.search(r"rank 2 on .* no 'latest' there", found) or "no latest there" in found
    (found, _), _ = views(copy, run)
    assert f"but rank 1 on {host} a 'latest' that names 'step_00000010'" in found


@pytest.mark.slow
def test_a_fresh_folder_that_is_not_shared(tmp_path: Path) -> None:
    """Neither holds anything yet; the deepest folder there is decides."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert views(one, one) == [("", ["scratch"])] * 2
    (found, _), (other, _) = views(one, two)
    assert found == other
    assert re.search(
        r"what rank 0 on \S+ writes there, rank 1 on \S+ cannot see; choose one on a file", found
    )
    assert not list(tmp_path.glob("*/*")), "a probe was left"


def test_a_file_system_that_is_slow_is_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    there = Path.exists
    late = lambda path: there(path) and (not path.name.startswith(".probe") or len(slept) == 3)  # noqa: E731
    monkeypatch.setattr(Path, "exists", late)
    monkeypatch.setattr(agreement.time, "sleep", slept.append)
    check_shared(str(tmp_path), alone(2))
    assert len(slept) == 3
    assert not list(tmp_path.iterdir()), "a probe was left"
