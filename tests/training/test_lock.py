"""One run a folder: who has it, who is refused, and when a dead one's lock is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.signals import process
from megatron_iiet.training.lock import Holder, RunLock

ME = Holder.of_this_process()
ELSEWHERE = replace(ME, host="elsewhere", id="other")


class Wait:
    """A clock that only moves while somebody sleeps, and what happens meanwhile, by time."""

    def __init__(self, **at: Any) -> None:
        self.now = 1000.0
        self.events = {1000.0 + float(name.removeprefix("s")): event for name, event in at.items()}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for time in [t for t in self.events if t <= self.now]:
            self.events.pop(time)()


def lock(folder: Path, wait: Wait | None = None, said: list[str] | None = None, **changes: Any) -> RunLock:
    """A start's, as another process of this kind would have it."""
    wait = wait or Wait()
    me = replace(Holder.of_this_process(), **changes)
    say = (lambda text: None) if said is None else said.append
    return RunLock(folder, say=say, me=me, clock=lambda: wait.now, sleep=wait.sleep)


def held_by(folder: Path, holder: Holder) -> Path:
    path = folder / "run.lock"
    path.write_bytes(holder.to_bytes())
    return path


def dead_process() -> int:
    """The id of a process that was there."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


def test_a_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    first = lock(tmp_path / "run")
    first.take()
    first.beat()
    held = json.loads((tmp_path / "run/run.lock").read_text())
    assert (held["pid"], held["beat"]) == (os.getpid(), 1)
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == [], "nor is the folder, which was made for it and in which nothing is"
    first = lock(tmp_path / "a/run")
    first.take()
    (tmp_path / "a/run/log.jsonl").touch()
    first.release()
    assert [path.name for path in (tmp_path / "a/run").iterdir()] == ["log.jsonl"]


def test_a_second_start_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    first = lock(tmp_path, since="2026-01-02T03:04:05+00:00")
    first.take()
    with pytest.raises(ValueError, match=rf"^output_dir is {tmp_path}, where another run writes, process "
                       rf"{os.getpid()} on {ME.host}, started 2026-01-02T03:04:05\+00:00; wait"):  # fmt: skip
        lock(tmp_path).take()
    first.check()
    first.release()


@pytest.mark.parametrize(
    ("changes", "mine", "why"),
    [
        ({"start": 1}, {}, "that process is gone"),
        ({"host": "elsewhere", "job": "7", "restart": "0"}, {"job": "7", "restart": "1"}, "SLURM job 7"),
        ({"host": "elsewhere"}, {}, "no sign of life for 10 s"),
        ({"boot": "another"}, {}, "no sign of life"),
        ({"namespace": "pid:[1]"}, {}, "no sign of life"),
        ({"host": "elsewhere", "job": "7"}, {"job": "7"}, "no sign of life"),  # two steps of one job
        ({"host": "elsewhere", "restart": "3"}, {}, "no sign of life"),  # both outside a job
    ],
)
def test_a_dead_ones_lock_is_taken_over_and_told(
    changes: dict[str, Any], mine: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """A process id counts where it was given, and as that process: it is this test's own here."""
    held_by(tmp_path, replace(ME, id="dead", **changes))
    wait, said = Wait(), []  # type: ignore[var-annotated]
    second = lock(tmp_path, wait, said, **mine)
    second.take()
    assert "run.lock of process" in said[-1]
    assert why in said[-1].partition(" is taken over: ")[2]
    assert len(said) == (2 if "life" in why else 1)
    assert wait.now - 1000 == pytest.approx(10 if "life" in why else 0, abs=0.5)
    assert Holder.from_bytes((tmp_path / "run.lock").read_bytes()) == second.me
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_gone_or_was_not_waited_for_is_dead() -> None:
    assert replace(ME, pid=dead_process()).lives(ME) is False
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    found = process(child)
    assert found is not None
    assert replace(ME, pid=child, start=found.start).lives(ME) is False
    os.waitpid(child, 0)
    assert ME.lives(ME) is True
    assert ELSEWHERE.lives(ME) is None


def test_a_heart_that_beats_is_a_sign_of_life(tmp_path: Path) -> None:
    path = held_by(tmp_path, ELSEWHERE)
    beat = Wait(s9=lambda: path.write_bytes(replace(ELSEWHERE, beat=1).to_bytes()))
    with pytest.raises(ValueError, match=r"another run writes, process .* on elsewhere"):
        lock(tmp_path, beat).take()
    assert Holder.from_bytes(path.read_bytes()) == replace(ELSEWHERE, beat=1)


def test_a_lock_that_goes_while_one_waits_is_free(tmp_path: Path) -> None:
    path = held_by(tmp_path, ELSEWHERE)
    second = lock(tmp_path, Wait(s3=path.unlink))
    second.take()
    second.release()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"pid": "x"}', b"\xff\xfe", b"{" * 5000])
def test_what_is_no_lock_is_given_time_to_become_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    said: list[str] = []
    second = lock(tmp_path, said=said)
    second.take()
    second.release()
    assert "an unknown process" in said[0]


def test_whoever_lost_the_folder_ends(tmp_path: Path) -> None:
    """Be it found by the heart or by looking; the lock of the other stays as it is, at the end too."""
    for find in (RunLock.beat, RunLock.check):
        first = lock(tmp_path)
        first.take()
        path = held_by(tmp_path, ELSEWHERE)
        if find is RunLock.beat:
            first.beat()
            assert first.lost
        with pytest.raises(ValueError, match=rf"{tmp_path} was taken over by process .* on elsewhere"):
            first.check()
        first.release()
        assert path.read_bytes() == ELSEWHERE.to_bytes()
        path.unlink()


def test_a_lock_removed_by_hand_is_made_again(tmp_path: Path) -> None:
    first = lock(tmp_path)
    first.take()
    (tmp_path / "run.lock").unlink()
    first.beat()
    first.check()
    with pytest.raises(ValueError, match="another run writes"):
        lock(tmp_path).take()
    first.release()


def test_without_links_there_are_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError("not on this file system")

    monkeypatch.setattr(os, "link", no_link)
    first = lock(tmp_path)
    first.take()
    with pytest.raises(ValueError, match="another run writes"):
        lock(tmp_path).take()
    first.release()
    assert list(tmp_path.iterdir()) == []


def _start(folder: str, ready: Any, results: Any) -> None:
    own = RunLock(folder, say=lambda text: None)
    ready.wait()
    try:
        own.take()
        results.put("has it")
    except ValueError:
        results.put("refused")
    ready.wait()  # until all know
    own.release()


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True], ids=["free", "of a dead process"])
def test_of_simultaneous_starts_one_has_it(stale: bool, tmp_path: Path) -> None:
    """Four processes, three times."""
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        if stale:
            held_by(tmp_path, replace(ME, id="dead", pid=dead_process()))
        ready, results = context.Barrier(4), context.Queue()
        starts = [context.Process(target=_start, args=(str(tmp_path), ready, results)) for _ in range(4)]
        for start in starts:
            start.start()
        found = sorted(results.get() for _ in starts)
        for start in starts:
            start.join()
        assert found == ["has it"] + ["refused"] * 3
        assert list(tmp_path.iterdir()) == []


def test_the_heart_beats_in_a_thread_of_its_own(tmp_path: Path) -> None:
    """And a fork of the process neither beats nor lets go."""
    beaten = threading.Event()
    me = RunLock(tmp_path, interval=0.01)
    whole = me.beat

    def beat() -> None:
        whole()
        beaten.set()

    me.beat = beat  # type: ignore[method-assign]
    me.take()
    assert beaten.wait(60)
    child = os.fork()
    if not child:
        me.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "run.lock").exists()
    me.release()
    assert not (tmp_path / "run.lock").exists()
