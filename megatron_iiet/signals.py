"""Requests to stop: signals, the end of the launcher, a limit of time.

Heard from before anything slow is imported (no torch here), and by a thread of its own: the main one may sit
in a collective whose peer is gone. The training loop asks (:mod:`megatron_iiet.training.stopping`); where it
cannot, this module ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, cast

REQUEUE = 75
"""Exit status of a run that was asked to stop, and that the same command goes on with (EX_TEMPFAIL)."""
STOP_SIGNALS = {"USR1": signal.SIGUSR1, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
ONE_REQUEST_SECONDS = 1.0
"""Ctrl-C reaches a rank from the terminal and from its launcher: within this they are one request."""
START_SECONDS = 5.0
"""How long a start, which has nothing to save, may take to end in order."""
STEP_SECONDS = 120.0
"""How long ranks may take to agree to stop, unless their steps take half of that or more."""
_TICK_SECONDS = 1.0
_INITS = ("systemd", "init", "tini", "dumb-init", "docker-init")


class Phase(Enum):
    """How far a process is; it says what a request does."""

    ALONE = "no other rank has been met: the process ends at once"
    STARTING = "nothing has been trained: it ends at the end of its start, or soon"
    TRAINING = "it goes on to where all ranks ask"
    ENDING = "all ranks save, or finish, what they agreed on"


class Process(NamedTuple):
    """A process of this host as the kernel knows it."""

    state: str
    parent: int
    start: int
    """In clock ticks since the boot: a process id is used again, with another start."""

    @property
    def lives(self) -> bool:
        """Whether it still runs; nobody may have waited for one that has ended."""
        return self.state not in "ZX"


def process(pid: int) -> Process | None:
    """What there is of a process id; None if nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return Process(fields[0].decode(), int(fields[1]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def seconds_since_start() -> float:
    """How long this process has run."""
    own = process(os.getpid())
    if own is None:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - own.start / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()


class Launcher:
    """The processes of deepspeed or torchrun above this one. When one of them is gone, what it started goes
    on for ever, and nobody hears of it."""

    def __init__(self) -> None:
        above: list[tuple[int, Process, bool]] = []
        pid = os.getppid()
        while pid > 0 and (found := process(pid)) is not None:
            above.append((pid, found, _is_launcher(pid)))
            pid = found.parent
        last = max((n for n, (_, _, launches) in enumerate(above) if launches), default=-1)
        self._chain = [(pid, found.start) for pid, found, _ in above[: last + 1]]
        self._wanted = _was_started_by_one(os.environ)

    @property
    def gone(self) -> bool:
        """Whether one of them has ended, perhaps before this process looked."""
        now = [(process(pid), start) for pid, start in self._chain]
        return any(p is None or p.start != start or not p.lives for p, start in now) or self._lacks_one()

    def _lacks_one(self) -> bool:
        """Whether a launcher is gone that was not seen: it had ended before, or was about to, when a process
        shows no command line any more. Then the topmost of those that were seen, or this process, has been
        handed to an init. (deepspeed runs a second process, which starts the ranks.)"""
        top = self._chain[-1][0] if self._chain else os.getpid()
        if not self._wanted or (self._chain and "deepspeed.launcher.launch" not in _words(top)):
            return False
        found = process(top)
        adopter, comm = found.parent if found else 0, ""
        with suppress(OSError):
            comm = Path(f"/proc/{adopter}/comm").read_text(encoding="utf-8").strip()
        if adopter == 1:  # of a container it may be a launcher that is not known here
            return "python" not in _words(adopter)[0].rsplit("/", 1)[-1]
        return comm in _INITS


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def _is_launcher(pid: int) -> bool:
    """Python, running a launcher."""
    command, *words = _words(pid)
    names = {word.rsplit("/", 1)[-1] for word in words[:6]} | set(words[:6])
    known = {"deepspeed", "torchrun", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}
    return "python" in command.rsplit("/", 1)[-1] and bool(names & (known | {"torch.distributed.run"}))


def _was_started_by_one(environ: os._Environ[str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ or {"CROSS_RANK", "LOCAL_SIZE"} <= environ.keys()


class StopRequests:
    """What asks this process to stop, and how long that may take."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
        age: Callable[[], float] = seconds_since_start,
        launcher: Launcher | None = None,
    ) -> None:
        self.phase = Phase.ALONE
        self.reason = ""
        """Of the first request; empty: there is none."""
        self.limit: float | None = None
        """Seconds that this process may run."""
        self._clock, self._leave, self._age, self._launcher = clock, leave, age, launcher
        self._asked_at = self._firmly_at = -1.0
        self._asked_before = clock()
        self._longest_gap = 0.0
        self.listen: Callable[[], None] = lambda: None
        """Note the signals that have come so far."""

    def enter(self, phase: Phase) -> None:
        """From now on, requests mean what ``phase`` says."""
        self.phase = phase
        self._asked_before, self._longest_gap = self._clock(), 0.0

    def ask(self) -> bool:
        """Whether this process was asked to stop; called between steps, and noting how far apart."""
        now = self._clock()
        self._longest_gap = max(self._longest_gap, now - self._asked_before)
        self._asked_before = now
        self.listen()
        self.tick()
        return bool(self.reason)

    def note_signal(self, number: int) -> None:
        """A signal has come. A second one of those that people and schedulers send means: now."""
        name, now = signal.Signals(number).name, self._clock()
        if number in (signal.SIGTERM, signal.SIGINT):
            if self._firmly_at < 0:
                self._firmly_at = now
            elif now - self._firmly_at >= ONE_REQUEST_SECONDS:
                self._end(128 + number, f"{name} again: ending now; the newest checkpoint is kept")
        self.request(name)

    def request(self, reason: str) -> None:
        """Ask for a stop; ``reason``: a few words."""
        if not self.reason:
            self.reason, self._asked_at = reason, self._clock()
        if self.phase is Phase.ALONE:
            self._end(REQUEUE, f"stopping on {self.reason} before the first step")

    def tick(self) -> None:
        """Look at the launcher and at the clock."""
        if self._launcher is not None and self._launcher.gone:
            self.request("the end of its launcher")
        if self.limit is not None and self._age() >= self.limit:
            self.request("training.max_wall_time")
        if not self.reason or self.phase is Phase.ENDING:
            return
        waited = self._clock() - max(self._asked_at, self._asked_before)
        if self.phase is Phase.STARTING and waited >= START_SECONDS:
            self._end(REQUEUE, f"stopping on {self.reason} before the first step")
        elif waited >= max(STEP_SECONDS, 2 * self._longest_gap):
            self._end(
                1,
                f"asked to stop by {self.reason}, but the ranks have not come to agree on it for "
                f"{waited:.0f} s: ending without a checkpoint of this step",
            )

    def _end(self, status: int, sentence: str) -> None:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if status != REQUEUE or rank == "0":
            with suppress(OSError):
                os.write(2, f"rank {rank}: {sentence}\n".encode())
        self._leave(status)


class _Ear:
    """Gives signals to requests, in a thread that no long call of the main one keeps from it."""

    def __init__(self, requests: StopRequests, numbers: Sequence[int]) -> None:
        self._requests = requests
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _note) for number in numbers}
        self._over = False
        self._reading = threading.Lock()
        requests.listen = self._read
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while not self._over:
            poll.poll(_TICK_SECONDS * 1000)
            self._read()
            self._requests.tick()

    def _read(self) -> None:
        with self._reading, suppress(BlockingIOError):
            for number in os.read(self._reader, 4096):
                if number in self._before:
                    self._requests.note_signal(number)

    def forget(self, numbers: Sequence[int]) -> None:
        """From now on these signals mean what they did before."""
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))

    def close(self, *, in_fork: bool = False) -> None:
        """Everything is as it was."""
        self._over = True
        self._requests.listen = lambda: None
        signal.set_wakeup_fd(self._wakeup)
        self.forget(list(self._before))
        if not in_fork:
            os.write(self._writer, b"\0")
            self._thread.join()
        os.close(self._reader)
        os.close(self._writer)


class _Unread:
    """A stream that nobody may read any more: what stops a run (Ctrl-C to `... | tee log`, the end of an ssh
    connection) ends its reader first, and the run is still to be saved."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a text stream's."""
        with self._reader_may_be_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        with self._reader_may_be_gone():
            self._stream.flush()

    @contextmanager
    def _reader_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _note(number: int, frame: object) -> None:
    """The interpreter has written the number into a pipe; without a handler it would not."""


requests = StopRequests()
"""This process's."""
_ear: _Ear | None = None


def _in_a_fork() -> None:
    """A child that runs something else hears nothing of this, and tells its parent nothing."""
    global _ear, requests
    if _ear is not None:
        _ear.close(in_fork=True)
        _ear, requests = None, StopRequests()


os.register_at_fork(after_in_child=_in_a_fork)


@contextmanager
def heard(phase: Phase = Phase.ALONE) -> Iterator[StopRequests]:
    """Inside the block, SIGUSR1, SIGTERM and SIGINT are requests to stop; blocks in blocks are one. In
    another thread than the main one no signal is heard."""
    global _ear, requests
    if _ear is not None or threading.current_thread() is not threading.main_thread():
        yield requests
        return
    requests = StopRequests(launcher=Launcher())
    requests.enter(phase)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Unread(stream)) for stream in streams)
    # A shell's background job ignores SIGINT, and should.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    _ear = _Ear(requests, [n for n in STOP_SIGNALS.values() if n != signal.SIGINT or not ignored])
    try:
        yield requests
    finally:
        forget()
        sys.stdout, sys.stderr = streams


def forget() -> None:
    """From now on signals mean what they did before :func:`heard`."""
    global _ear, requests
    if _ear is not None:
        ear, _ear = _ear, None
        ear.close()
        requests = StopRequests()


def keep_only(names: Sequence[str]) -> None:
    """Of SIGUSR1 and SIGTERM, only those named ask for a stop."""
    if _ear is not None:
        _ear.forget([STOP_SIGNALS[name] for name in ("USR1", "TERM") if name not in names])


def leave(status: int) -> NoReturn:
    """End this process with ``status``; everything is closed already. Ranks end together: the clean-up of an
    interpreter takes long enough for a launcher to kill what is left after the first."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
