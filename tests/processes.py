"""No process that a test starts outlives it, however test and pytest end.

Every process inherits the environment of the one that started it, also across sessions, process groups and
launchers. So pytest puts a mark into its environment, and whatever bears it is ended

* after each test, if the test started it (:class:`Session`);
* once pytest is gone, by a guardian that waits for that in a session of its own: a SIGKILL to pytest leaves
  nothing behind.

All of it needs Linux, 5.3 or newer; elsewhere pytest runs without.

A process that forks without an exec keeps the environment of its parent's start in /proc, which is pytest's
own: there :func:`die_with_parent` is to be called in the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "MEGATRON_IIET_STARTED_BY"
"""Variable in the environment of every process started by a test."""
_STARTS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec")
_PR_SET_PDEATHSIG = 1


def marked(mark: str, variable: str = MARK) -> dict[int, str]:
    """Living processes that bear ``mark``: id → command line. This process is not among them."""
    wanted, found = f"{variable}={mark}".encode(), {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone, or of another user
            if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                line = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(name)] = line.decode(errors="replace").strip()
    found.pop(os.getpid(), None)
    return found


def end(mark: str, kept: frozenset[int] = frozenset(), seconds: float = 10.0) -> list[str]:
    """Kill what bears ``mark`` until nothing is left; command lines of what was killed. ``kept``: ids that
    are spared."""
    killed: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    while (left := {p: line for p, line in marked(mark).items() if p not in kept}) and (
        time.monotonic() < deadline
    ):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed |= left
        time.sleep(0.01)  # what they had started before they died is in the next round
    return list(killed.values())


def guard(*folders: str) -> str:
    """Mark what this process starts from now on, and start the guardian that ends it when this process is
    gone, and removes ``folders`` then. Returns the mark."""
    mark = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if key != MARK}
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark, *folders]
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)]
    os.posix_spawn(sys.executable, command, environment, file_actions=quiet, setsid=True)
    os.environ[MARK] = mark
    return mark


def own_mark() -> dict[str, str]:
    """For the environment of a process that does not inherit all of this one's."""
    return {MARK: os.environ.get(MARK, "")}


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that forked it ends; for children without an exec.

    ``parent``: its id, if known, in case that it is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


class Session:
    """The processes of one pytest process."""

    def __init__(self) -> None:
        self.mark = guard()
        self._before: frozenset[int] | None = None
        self._watching = False
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, _: object) -> None:
        if self._watching and self._before is None and event in _STARTS:
            self._before = frozenset()  # looking causes events too
            self._before = frozenset(marked(self.mark))

    @contextlib.contextmanager
    def end_of_test(self) -> Iterator[None]:
        """End what is started inside the block, but for the helpers that multiprocessing keeps for good.

        To look at all processes takes milliseconds: that is done only where one was started, be it by
        multiprocessing, which causes no event."""
        children = _children()
        self._before, self._watching = None, True
        try:
            yield
        finally:
            self._watching = False
            if self._before is not None or _children() - children:
                end(self.mark, (self._before or frozenset()) | children | _helpers(self.mark))


def _children() -> frozenset[int]:
    """Of this process, however they were started."""
    lists = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            lists += (thread / "children").read_text().split()
    return frozenset(map(int, lists))


def _helpers(mark: str) -> frozenset[int]:
    """The fork server and the resource tracker of this process."""
    kept = ("from multiprocessing.forkserver", "from multiprocessing.resource_tracker")
    return _children() & {p for p, line in marked(mark).items() if any(name in line for name in kept)}


def _wait_for(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone already
        poll = select.poll()
        poll.register(os.pidfd_open(process), select.POLLIN)
        poll.poll()


if __name__ == "__main__":
    _wait_for(int(sys.argv[1]))
    end(sys.argv[2])
    for path in sys.argv[3:]:
        shutil.rmtree(path, ignore_errors=True)
