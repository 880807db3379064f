"""Hosts on one machine: network, mount, UTS and process-id namespaces, on a switch of their own.

Each has a name, an address, a boot id, its own /tmp, /dev/shm and processes; everything else of the file
system is what all share, as a network file system would be. The machine's own network stays as it is, and
nothing outlives the processes that hold the namespaces, which end with the test (``tests/processes.py``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.distributed.harness import run_ranks
from tests.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def why_not() -> str:
    """Why there can be no hosts here; empty if there can."""
    tried = (
        "ip link add one type veth peer name two && ip link add switch type bridge && mount -t tmpfs t /mnt"
    )
    try:
        done = subprocess.run(
            ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", tried],
            capture_output=True,
            text=True,
        )
    except OSError as error:
        return f"no namespaces: {error}"
    return "" if done.returncode == 0 else f"no namespaces: {done.stderr.strip()}"


class Host:
    """One of :class:`Hosts`; made anew when it is started again after its end."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.name = f"host-{'abcdefgh'[number]}"
        self.address = f"10.77.0.{number + 1}"
        self.port = f"port{number}"
        self.files = folder / self.name
        self.process: subprocess.Popen[str] | None = None
        self.pid = 0
        """Of its first process, as the machine sees it."""

    def inside(self, *command: str) -> list[str]:
        """A command line that runs another one in this host."""
        namespaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *namespaces, "env", "-C", str(ROOT), *command]


class Hosts:
    """``with Hosts(tmp_path, 2) as hosts:``. All of them see ``shared``, at its own path."""

    def __init__(self, shared: Path, number: int = 2) -> None:
        self.shared = shared
        self._files = shared / ".hosts"
        self.hosts = [Host(n, self._files) for n in range(number)]
        self._switch: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def __enter__(self) -> Hosts:
        try:
            self._switch = _holding("unshare", "--net", "sh", "-c", "echo here; exec sleep infinity")
            self._on_switch("link", "add", "switch", "type", "bridge")
            self._on_switch("link", "set", "switch", "up")
            for host in self.hosts:
                self.start(host.number)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start(self, number: int) -> None:
        """Boot a host, which is down."""
        host = self.hosts[number]
        host.files.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{one.address} {one.name}\n" for one in self.hosts)
        (host.files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (host.files / "boot_id").write_text(f"{uuid.uuid4()}\n")
        flags = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        host.process = _holding("unshare", *flags, "sh", "-ec", self._booting(host))
        host.pid = int(Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text())
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        with suppress(RuntimeError):  # the kernel takes its time to remove what a dead host had
            self._on_switch("link", "delete", host.port)
        self._on_switch("link", "add", host.port, *peer)
        self._on_switch("link", "set", host.port, "master", "switch", "up")
        in_it = ["nsenter", "--target", str(host.pid), "--net"]
        _do(*in_it, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        _do(*in_it, "ip", "link", "set", "eth0", "up")

    def run(
        self, number: int, *command: str, environ: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command there, in the repository's root; its output is read as text."""
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            self[number].inside(*command),
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
            **(streams | options),
        )
        self._started.append(process)
        return process

    def signal(self, process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to what :meth:`run` has started."""
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), number)

    def processes(self, number: int) -> list[str]:
        """Command lines of what runs there, but for the host's own."""
        listed = _do(*self[number].inside("ps", "-e", "-o", "args=")).splitlines()
        return [line for line in listed if "sleep infinity" not in line and "ps -e -o args=" not in line]

    def kill(self, number: int) -> None:
        """All its processes are gone at once; the kernel still closes their connections, as that of a host
        does not that loses power: for that, take its link down before."""
        host = self.hosts[number]
        if host.process is not None:
            with suppress(ProcessLookupError):
                os.kill(host.pid, signal.SIGKILL)
            host.process.wait()
            host.process = None

    def link(self, number: int, up: bool) -> None:
        """Pull a host's cable out of the switch, or put it back: what it sends and is sent is lost."""
        self._on_switch("link", "set", self[number].port, "up" if up else "down")

    def slow(self, number: int, rate: str) -> None:
        """Limit what a host sends and is sent to so much each, as tc writes it: ``2mbit``."""
        limit = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "500ms"]
        self._on_switch("qdisc", "replace", "dev", self[number].port, *limit, tool="tc")
        _do(*self[number].inside("tc", "qdisc", "replace", "dev", "eth0", *limit))

    def unshare(self, number: int, folder: Path) -> None:
        """From now on a host has a folder of its own at that path, which is empty."""
        folder.mkdir(parents=True, exist_ok=True)
        _do(*self[number].inside("mount", "-t", "tmpfs", "tmpfs", str(folder)))

    def write(self, number: int, path: str, content: str) -> None:
        """Put a file of its own in the place of one that all have."""
        own = self[number].files / path.replace("/", "_")
        own.write_text(content)
        _do(*self[number].inside("mount", "--bind", str(own), path))

    def _booting(self, host: Host) -> str:
        """The shell script of a host's first process; it says when it is through."""
        lines = [
            f"hostname {host.name}",
            f"mount --bind {_quoted(host.files / 'hosts')} /etc/hosts",
            f"mount --bind {_quoted(host.files / 'boot_id')} /proc/sys/kernel/random/boot_id",
            "mount -t tmpfs tmpfs /dev/shm",
            "mount --rbind /tmp /mnt",
            "mount -t tmpfs tmpfs /tmp",
        ]
        for kept in (self.shared, ROOT, Path(sys.prefix).resolve()):
            if kept.is_relative_to("/tmp"):
                there = _quoted(Path("/mnt") / kept.relative_to("/tmp"))
                lines += [f"mkdir -p {_quoted(kept)}", f"mount --bind {there} {_quoted(kept)}"]
        lines += ["umount -l /mnt", "ip link set lo up", "echo here", "exec sleep infinity"]
        return "\n".join(lines)

    def _on_switch(self, *arguments: str, tool: str = "ip") -> None:
        assert self._switch is not None
        _do("nsenter", "--target", str(self._switch.pid), "--net", tool, *arguments)

    def _end(self) -> None:
        for host in self.hosts:
            self.kill(host.number)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
        for process in self._started:
            process.kill()
            for stream in (process.stdout, process.stderr):
                _close(stream)
            process.wait()


def clock_apart(folder: Path, seconds: int) -> dict[str, str]:
    """Environment of a process that reads another time of day: a time namespace shifts monotonic clocks
    only. What the kernel itself stamps, as a file's time, stays."""
    library = folder / "clock_apart.so"
    if not library.exists():
        source = folder / "clock_apart.c"
        source.write_text(_CLOCK)
        _do("cc", "-shared", "-fPIC", "-o", str(library), str(source))
    return {"LD_PRELOAD": str(library), "CLOCK_APART": str(seconds)}


_CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long apart(void) { const char *s = getenv("CLOCK_APART"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (!status && clock == CLOCK_REALTIME) now->tv_sec += apart();
    return status;
}
int gettimeofday(struct timeval *now, void *zone) {
    int status = syscall(SYS_gettimeofday, now, zone);
    if (!status) now->tv_sec += apart();
    return status;
}
time_t time(time_t *out) {
    time_t now = syscall(SYS_time, NULL) + apart();
    if (out) *out = now;
    return now;
}
"""


def on_hosts(hosts: Hosts, places: Sequence[int], function: Callable[..., Any], *args: Any) -> list[Any]:
    """As ``run_ranks``, rank r in host ``places[r]``; the result of a rank whose host is killed is None."""
    first = hosts[places[0]]
    pids = [hosts[place].pid for place in places]
    return run_ranks(_in_its_host, len(places), pids, first.address, function, args)


def _in_its_host(pids: list[int], address: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not _enter(pids[int(os.environ["RANK"])]):
        return None
    os.environ.update(MASTER_ADDR=address, MASTER_PORT="29500", TORCHELASTIC_USE_AGENT_STORE="False")
    return function(*args)


def _enter(host_pid: int) -> bool:
    """Take this process, a fork of one thread, into a host: it goes on there, in a child of its own. False:
    that was killed, and this is the process outside again."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.getcwd()
    kinds = ("net", "uts", "mnt", "pid")  # the last one is entered by children
    for file in [os.open(f"/proc/{host_pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        die_with_parent()
        return True
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        os._exit(status)
    return False


def _holding(*command: str) -> subprocess.Popen[str]:
    """A process that holds namespaces, once it has said that it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "here\n":
        raise RuntimeError(f"{shlex.join(command)}: {process.stderr.read()}")
    process.stdout.close()
    process.stderr.close()
    return process


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        stream.close()


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each, all of which end in so long; else TimeoutExpired."""
    deadline = time.monotonic() + seconds
    said = [process.communicate(timeout=max(0.0, deadline - time.monotonic())) for process in processes]
    return [(p.returncode, *each) for p, each in zip(processes, said, strict=True)]
