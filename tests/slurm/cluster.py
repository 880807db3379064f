"""A SLURM cluster of this machine's own: munged, slurmctld and one slurmd a logical node, all in one folder.

The nodes' names are addresses of the loopback interface, which every process can reach without a name server.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.processes import marked

NODES = ("127.0.0.1", "127.0.0.2")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "scontrol", "squeue", "scancel", "sdiag", "sinfo")
SEARCHED = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
MARK = "SLURM_TEST_CLUSTER"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SlurmdTimeout=10
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=300
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs=2 RealMemory=1000\n"


def missing() -> str:
    """Why there is no SLURM here, in a sentence; empty if there is."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    return f"no {', '.join(absent)} on PATH; to have SLURM: {INSTALL}" if absent else ""


class Cluster:
    """Two nodes with two cores each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = getpass.getuser()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        mark = uuid.uuid4().hex
        self.environment |= {"PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf"), MARK: mark}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons."""
        host, folder = socket.gethostname(), self.folder
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            ports = [each.getsockname()[1] for each in sockets]
        (folder / "state").mkdir()
        nodes = "".join(NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports[1:], strict=True))
        text = CONFIGURATION.format(host=host, ports=ports, user=self.user, folder=folder)
        (folder / "slurm.conf").write_text(nodes + text)
        (folder / "munge.key").write_bytes(os.urandom(256))
        (folder / "munge.key").chmod(0o600)
        names = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        files = [f"--{option}={folder / f'munge.{name}'}" for option, name in names.items()]
        self._start("munged", "--foreground", "--force", *files)  # --force: whoever owns the folders above
        self.wait_until(lambda: (folder / "munge.socket").exists(), "munged listens")
        self._start("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start a node that is not running, and wait until jobs may run there."""
        daemon = self._daemons.get(name)
        if daemon is None or daemon.poll() is not None:
            self._start("slurmd", "-D", "-N", name, key=name)
        idle = re.compile(r"(idle|mixed|allocated)$")
        self.wait_until(lambda: bool(idle.match(self.node_state(name))), f"node {name} is up")

    def kill_node(self, name: str, *, in_silence: bool = True) -> None:
        """Kill all that a node runs, its daemons first; unless ``in_silence``, the slurmstepd of a job can
        still tell that its tasks are dead."""
        daemon = self._daemons[name]
        log = self.folder / f"slurmd_{name}.log"
        tasks = set(marked(name, "SLURMD_NODENAME")) & set(self._processes())
        for process in (*(_users(log) if in_silence else [daemon.pid]), *tasks):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        daemon.wait()

    def settle(self) -> None:
        """Wait until nothing is left to be sent to nodes: one that comes back would be told to end what a job
        had there before, and end what it has there by then."""
        empty = re.compile(r"^Agent queue size:\s+0$", re.MULTILINE)
        self.wait_until(lambda: bool(empty.search(self.call("sdiag"))), "all messages are sent")

    def stop(self) -> None:
        """End everything."""
        for name in NODES:
            if name in self._daemons:
                self.kill_node(name)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def call(self, *command: object) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: object, cwd: Path, **variables: str) -> Job:
        """``sbatch`` with these options, script and arguments."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, int(done.stdout))

    def node_state(self, name: str) -> str:
        """As sinfo writes it; with a star where the node does not answer."""
        return self.call("sinfo", "--noheader", "--partition=low", f"--nodes={name}", "--format=%T")

    def tasks(self, **variables: object) -> list[int]:
        """Living processes of jobs with these environment variables."""
        found = set(self._processes())
        for name, value in variables.items():
            found &= set(marked(str(value), name))
        return sorted(found)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        """Ask until it holds.

        Raises:
            AssertionError: it does not for so long.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if time.monotonic() > deadline:
                jobs = self.call("squeue", "--format=%i %T %r")
                raise AssertionError(f"waited {seconds:.0f} s until {what}; ended: {ended}; jobs: {jobs}")
            time.sleep(0.2)

    def _start(self, program: str, *arguments: str, key: str = "") -> None:
        path = shutil.which(program, path=SEARCHED)
        assert path is not None
        with (self.folder / f"{program}{key}.out").open("ab") as out:
            self._daemons[key or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, cwd=self.folder, stdout=out, stderr=out
            )

    def _processes(self) -> dict[int, str]:
        return marked(self.environment[MARK], MARK)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.id = cluster, number

    def field(self, name: str) -> str:
        """Of ``scontrol show job``: JobState, Reason, Restarts, ExitCode, …"""
        found = re.search(rf"\b{name}=(\S+)", self.cluster.call("scontrol", "show", "job", self.id))
        assert found is not None
        return found[1]

    @property
    def over(self) -> bool:
        """Whether it will not run again."""
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait(self) -> str:
        """Wait for its end; the state it ended in."""
        self.cluster.wait_until(lambda: self.over, f"job {self.id} is over")
        return self.field("JobState")

    def restart(self) -> None:
        """Wait until it is in the queue again; without the two minutes that SLURM would leave it there. Not
        at once: a node refuses the credential of a job that it ended within the same second."""
        self.cluster.wait_until(
            lambda: self.field("JobState") == "PENDING" and self.field("Restarts") == "1",
            f"job {self.id} is in the queue again",
        )
        self.cluster.call("scontrol", "update", f"JobId={self.id}", "StartTime=now+3seconds")

    def cancel(self) -> None:
        """End it now."""
        with suppress(AssertionError):  # it is over
            self.cluster.call("scancel", self.id)


def _users(path: Path) -> Iterator[int]:
    """Processes that have a file open: of a node's log its slurmd, and the slurmstepd, one a step, which show
    no environment."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{name}/fd")]
            if str(path) in links:
                yield int(name)
