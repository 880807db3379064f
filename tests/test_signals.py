"""Requests to stop a process: what each of them does, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iiet import signals
from megatron_iiet.signals import Phase, StopRequests

ROOT = Path(__file__).resolve().parents[1]


class Left(BaseException):
    """Stands in for the end of the process."""


class Watched:
    """Requests with a clock that only moves by hand, of a process that ends by an exception."""

    def __init__(self, phase: Phase) -> None:
        self.now = self.age = 0.0
        self.gone = False
        self.requests = StopRequests(
            clock=lambda: self.now, leave=self.leave, age=lambda: self.age, launcher=self  # type: ignore[arg-type]
        )  # fmt: skip
        self.requests.enter(phase)

    def leave(self, status: int) -> None:
        raise Left(status)

    def status_at(self, seconds: float) -> int | None:
        """What the process ends with at this time; None if it goes on."""
        self.now = seconds
        try:
            self.requests.tick()
        except Left as left:
            return int(left.args[0])
        return None


def test_a_process_that_is_alone_ends_at_once() -> None:
    watched = Watched(Phase.ALONE)
    with pytest.raises(Left, match="75"):
        watched.requests.note_signal(signal.SIGUSR1)


def test_a_start_ends_in_order_or_soon() -> None:
    watched = Watched(Phase.STARTING)
    watched.requests.note_signal(signal.SIGTERM)
    assert watched.requests.ask()
    assert watched.status_at(signals.START_SECONDS - 0.1) is None
    assert watched.status_at(signals.START_SECONDS) == 75


def test_ranks_that_cannot_agree_end_without_a_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    """Not while a step takes long and always did."""
    watched = Watched(Phase.TRAINING)
    watched.now = 100.0
    assert not watched.requests.ask()  # 100 s between two of them
    watched.now = 110.0
    watched.requests.note_signal(signal.SIGUSR1)
    assert watched.status_at(309.0) is None
    assert watched.status_at(310.0) == 1
    assert "asked to stop by SIGUSR1, but the ranks have not come to agree" in capfd.readouterr().err


def test_nothing_hurries_ranks_that_save() -> None:
    watched = Watched(Phase.TRAINING)
    watched.requests.note_signal(signal.SIGTERM)
    watched.requests.enter(Phase.ENDING)
    assert watched.status_at(1e6) is None


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [("TERM", "TERM", 143), ("INT", "INT", 130), ("TERM", "INT", 130),
     ("USR1", "TERM", 0), ("INT", "USR1", 0)],
)  # fmt: skip
def test_the_second_time_means_now(first: str, second: str, status: int) -> None:
    """Of what people and schedulers send; Ctrl-C, which comes from terminal and launcher, is one request."""
    watched = Watched(Phase.TRAINING)
    watched.requests.note_signal(signals.STOP_SIGNALS[first])
    watched.now = 0.9
    watched.requests.note_signal(signals.STOP_SIGNALS[second])
    watched.now = 2.0
    if not status:
        watched.requests.note_signal(signals.STOP_SIGNALS[second if second == "USR1" else first])
        assert watched.requests.reason == f"SIG{first}"
        return
    with pytest.raises(Left, match=str(status)):
        watched.requests.note_signal(signals.STOP_SIGNALS[second])


def test_the_end_of_the_launcher_is_a_request_and_never_the_second() -> None:
    watched = Watched(Phase.TRAINING)
    watched.requests.note_signal(signal.SIGINT)
    watched.gone, watched.now = True, 5.0
    assert watched.status_at(6.0) is None
    again = Watched(Phase.TRAINING)
    again.gone = True
    assert again.requests.ask()
    assert again.requests.reason == "the end of its launcher"


def test_time_counts_from_the_start_of_the_process() -> None:
    watched = Watched(Phase.TRAINING)
    watched.requests.limit, watched.age = 60.0, 59.9
    assert not watched.requests.ask()
    watched.age = 60.0
    assert watched.requests.ask()
    assert 0 < signals.seconds_since_start() < 86400 * 30


CHILD = """
import os, sys
from megatron_iiet import signals
with signals.heard(signals.Phase[sys.argv[1]]) as requests:
    signals.keep_only(sys.argv[2].split(","))
    if len(sys.argv) > 3:
        child = os.fork()
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(status, requests.ask(), flush=True)
            sys.exit()
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("kept", "sent", "status"),
    [("USR1,TERM", "USR1", 75), ("USR1,TERM", "TERM", 75), ("USR1,TERM", "INT", 75), ("USR1", "TERM", -15),
     ("TERM", "USR1", -10), ("", "INT", 75)],
)  # fmt: skip
def test_what_is_heard_before_torch_is_there(kept: str, sent: str, status: int) -> None:
    """In a real process, whose main thread sits in a read."""
    command = [sys.executable, "-c", CHILD, "ALONE", kept]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signals.STOP_SIGNALS[sent])
        assert child.wait(60) == status


QUIET = """
from megatron_iiet import signals
signals._TICK_SECONDS = 1e6
with signals.heard():
    pass
"""


def test_the_thread_that_hears_is_woken_for_its_end() -> None:
    """And not waited for until its next look at the clock."""
    subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, check=True, timeout=60)


UNREAD = """
import sys
from megatron_iiet import signals
with signals.heard():
    sys.stdin.read()
    for stream in (sys.stdout, sys.stderr) * 2:
        print("to nobody", file=stream, flush=True)
signals.leave(signals.REQUEUE)
"""


def test_a_run_outlives_whoever_reads_what_it_prints() -> None:
    """`... | tee log` ends with the same Ctrl-C, an ssh connection with the launcher."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", UNREAD], cwd=ROOT, **pipes) as child:  # type: ignore[call-overload]
        for pipe in (child.stdout, child.stderr, child.stdin):
            pipe.close()
    assert child.returncode == signals.REQUEUE


def test_a_fork_dies_as_any_process_and_its_parent_hears_nothing() -> None:
    command = [sys.executable, "-c", CHILD, "TRAINING", "USR1,TERM", "fork"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        os.kill(int(child.stdout.readline()), signal.SIGTERM)
        assert child.stdout.readline().split() == [b"-15", b"False"]


@pytest.mark.parametrize("chain", ["deepspeed.launcher.launch", ""])
def test_a_launcher_that_ends_as_its_ranks_begin_is_missed(
    chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is dying shows no command line any more, and what it started is handed to an init later."""
    adopters = {os.getppid(): 50, os.getpid(): 50}
    if chain:  # what started this process
        adopters[os.getpid()] = os.getppid()
    words = {os.getppid(): ["python", "-m", chain]}
    monkeypatch.setattr(signals, "_words", lambda pid: words.get(pid, ["init"]))
    monkeypatch.setattr(
        signals, "process", lambda pid: signals.Process("S", adopters[pid], 7) if pid in adopters else None
    )
    launcher = signals.Launcher()
    assert not launcher.gone  # this test was started by none
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    launcher = signals.Launcher()
    assert not launcher.gone
    adopters[os.getppid() if chain else os.getpid()] = 1
    assert launcher.gone
    words[1] = ["/usr/bin/python3", "an-unknown-launcher"]  # the first process of a container
    assert not launcher.gone


LAUNCHER = """
import subprocess, sys
rank = [sys.executable, "-c", '''
from megatron_iiet import signals
with signals.heard(signals.Phase.TRAINING) as requests:
    print("ready", flush=True)
    while not requests.ask():
        pass
    print(requests.reason, flush=True)
''']
subprocess.run(rank)
"""


@pytest.mark.parametrize("killed", ["deepspeed", "torchrun", "another.py"])
def test_ranks_outlive_no_launcher(killed: str, tmp_path: Path) -> None:
    """SIGKILL to what started them, if it is a launcher: of anything else the end may be meant."""
    script = tmp_path / killed
    script.write_text(LAUNCHER)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], env=environ, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        [rank] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.kill()
        launcher.wait()
        if killed == "another.py":
            os.kill(int(rank), signal.SIGUSR1)
        expected = b"SIGUSR1\n" if killed == "another.py" else b"the end of its launcher\n"
        assert launcher.stdout.readline() == expected
