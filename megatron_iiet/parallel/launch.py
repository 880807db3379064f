"""Who this process is: what the DeepSpeed launcher, torchrun or srun left in the environment."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

_FIRST_PORT = 10_000
_PORTS = 20_000  # up to 29,999: below Linux's ephemeral ports (32768 and up), above well-known services
_STEPS_PER_JOB = 101  # steps of one job, and jobs started one after another, get ports of their own


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process's place among those started together."""

    rank: int
    """Rank in the world."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Index of this process's GPU among those it sees: its rank on this host, or 0 where it sees only one."""
    launcher: str
    """Who started it: "deepspeed or torchrun", "srun" or "none"."""
    master_address: str
    """Host of rank 0."""
    master_port: int
    """Where rank 0 listens; a world of one does not."""

    def check_master(self) -> None:
        """Make sure that the host of rank 0 has a name that is known here; torch would ask for it again and
        again for half an hour.

        Raises:
            ValueError: it has none.
        """
        if self.world_size == 1:
            return
        try:
            socket.getaddrinfo(self.master_address, self.master_port)
        except (socket.gaierror, UnicodeError) as error:
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                return  # the name server may answer later
            raise ValueError(
                f"rank {self.rank} on {socket.gethostname()} finds no address of {self.master_address}, the "
                "host of rank 0: set MASTER_ADDR to an address of that host that all hosts reach"
            ) from None

    @property
    def port_remedy(self) -> str:
        """How to have rank 0 listen elsewhere."""
        if self.launcher == "srun":
            return "set MASTER_PORT to another"
        return "give this one's launcher another --master_port"

    def published(self) -> AbstractContextManager[None]:
        """Tell torch.distributed and DeepSpeed, which look for it in environment variables.

        At the end they are again what they were: libraries that find RANK set (accelerate does) start a
        process group of their own.
        """
        return variables_set(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
        )


def listening_socket(address: str, port: int) -> socket.socket | None:
    """A socket on the interface of the address where ranks meet, and on no other: whoever reaches the store
    may write into it. None where that cannot be had: the port is taken, the address is a service's, which no
    interface here has, or a name that this host alone gives a loopback address (Debian's 127.0.1.1)."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, _, _, _, place in found:
        numeric = str(place[0])
        if ipaddress.ip_address(numeric).is_loopback and address not in (numeric, "localhost"):
            return None
        try:
            # All ranks may come at once; the kernel caps how many may wait.
            return socket.create_server(place, family=family, backlog=socket.SOMAXCONN)
        except OSError:
            continue
    return None


def restarts() -> int:
    """How often torchrun or SLURM has started this process's ranks before; 0 under other launchers."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name, "0")) for name in counts)


@contextmanager
def variables_set(**variables: str) -> Iterator[None]:
    """Environment variables with these values inside the block, and what they were afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Find this process's place.

    Looked for in this order: RANK (set by the DeepSpeed launcher and torchrun); a task of an srun step; else
    the process is a world of its own, also in the body of an sbatch script and in the shell of
    ``srun --pty``, where SLURM's variables speak of a whole job. Under srun, a MASTER_ADDR or MASTER_PORT
    that the user set is kept; the default is the step's first host and a port that follows from the ids of
    job and step.

    Raises:
        ValueError: variables are missing or contradict each other.
    """
    if "RANK" in environ:
        return _of_launcher(environ)
    if _is_srun_task(environ):
        return _of_srun(environ)
    if environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']!r} but RANK is not set: start every process with "
            "deepspeed, torchrun or srun, or unset WORLD_SIZE for a run of one process"
        )
    # A master left over from a script's preamble means other processes than this one.
    return LaunchEnvironment(0, 1, 0, "none", *_master({}, 1))


def first_host(node_list: str) -> str:
    """The first host of a list as SLURM writes it: ``gpu[003-007,012],login`` → ``gpu003``."""
    first = re.match(r"((?:[^,\[\]\s]|\[\d[\d,-]*\])+)(?:,|$)", node_list)
    if first is None:
        raise ValueError(
            f"cannot read the node list {node_list!r} of SLURM: set MASTER_ADDR to the host of rank 0"
        )
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first[1])


def _of_launcher(environ: Mapping[str, str]) -> LaunchEnvironment:
    remedy = "set by deepspeed and torchrun; unset RANK for a run of one process"
    rank, world_size = _integer(environ, "RANK", remedy), _integer(environ, "WORLD_SIZE", remedy)
    local_rank = _integer(environ, "LOCAL_RANK", remedy) if "LOCAL_RANK" in environ else 0
    _check_rank("RANK", rank, "WORLD_SIZE", world_size)
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise ValueError(
                    f"{name} is not set but WORLD_SIZE is {world_size}: start every process with deepspeed, "
                    f"torchrun or srun, or set {name} to where rank 0 listens"
                )
    return LaunchEnvironment(
        rank, world_size, local_rank, "deepspeed or torchrun", *_master(environ, world_size)
    )


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    # SLURM_PROCID and SLURM_NTASKS are also set in the body of an sbatch script (0, and the number of tasks
    # that srun would start there); the step's own variables only in what srun starts.
    if "SLURM_STEP_ID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return False
    # In the shell of `srun --ntasks 8 --pty bash` they speak of 8 tasks, while what is typed there runs once.
    # SLURM_PTY_PORT alone is no proof: it is inherited by steps that are started from that shell.
    is_step_itself = environ.get("SLURM_TASK_PID") == str(os.getpid())
    return is_step_itself or "SLURM_PTY_PORT" not in environ or not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _of_srun(environ: Mapping[str, str]) -> LaunchEnvironment:
    remedy = "set by srun for every task; unset SLURM_STEP_ID for a run of one process"
    rank = _integer(environ, "SLURM_PROCID", remedy)
    # Not SLURM_NTASKS: `srun --preserve-env` leaves the job's number there.
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", remedy)
    local_rank = _integer(environ, "SLURM_LOCALID", remedy)
    _check_rank("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", world_size)
    # With --gpus-per-task or --gpu-bind every task sees one GPU, as number 0.
    if environ.get("CUDA_VISIBLE_DEVICES", "").strip() and "," not in environ["CUDA_VISIBLE_DEVICES"]:
        local_rank = 0
    return LaunchEnvironment(rank, world_size, local_rank, "srun", *_master(environ, world_size))


def _master(environ: Mapping[str, str], world_size: int) -> tuple[str, int]:
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if world_size == 1 else "")
    if not address:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ValueError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0")
        address = first_host(nodes)
    remedy, port = "set it to a free port of the host of rank 0", _FIRST_PORT  # of one, nobody listens
    if environ.get("MASTER_PORT"):
        port = _integer(environ, "MASTER_PORT", remedy)
    elif world_size > 1:
        for_ids = "set MASTER_PORT to a free port of the host of rank 0"
        job, step = (_integer(environ, name, for_ids) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port += (job * _STEPS_PER_JOB + step) % _PORTS
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT is {port}, not in 1 to 65535: {remedy}")
    return address, port


def _integer(environ: Mapping[str, str], name: str, remedy: str) -> int:
    if name not in environ:
        raise ValueError(f"{name} is not set: {remedy}")
    value = environ[name].strip()
    if not re.fullmatch(r"[0-9]+", value):
        raise ValueError(f"{name} is {environ[name]!r}, not a non-negative integer: {remedy}")
    return int(value)


def _check_rank(rank_name: str, rank: int, size_name: str, world_size: int) -> None:
    if rank >= world_size:
        raise ValueError(
            f"{rank_name} is {rank} but {size_name} is {world_size}: ranks count from 0 to {world_size - 1}; "
            "correct one of them"
        )
