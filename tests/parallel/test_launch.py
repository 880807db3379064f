"""Who a process is, for the environments that launchers leave behind."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from megatron_iiet.parallel import launch
from megatron_iiet.parallel.launch import (
    LaunchEnvironment,
    first_host,
    launch_environment,
    listening_socket,
)

# As SLURM 22.05 sets them for a job of 2 nodes with 2 tasks each.
BATCH_BODY = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASK_PID": "1",
}
SRUN_TASK = {
    **BATCH_BODY,
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_TASKS": "4",
}
PTY = {**SRUN_TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "34325"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "gpu003",
    "MASTER_PORT": "29500",
}


def test_a_launcher_is_believed() -> None:
    found = launch_environment(TORCHRUN)
    assert found == LaunchEnvironment(5, 8, 1, "deepspeed or torchrun", "gpu003", 29500)


def test_a_launcher_inside_an_srun_task_wins() -> None:
    assert launch_environment(SRUN_TASK | TORCHRUN) == launch_environment(TORCHRUN)


def test_one_process_of_a_launcher_needs_no_master() -> None:
    found = launch_environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert found == LaunchEnvironment(0, 1, 0, "deepspeed or torchrun", "127.0.0.1", found.master_port)
    assert 1024 < found.master_port < 65536


def test_srun_task() -> None:
    found = launch_environment(SRUN_TASK)
    assert found == LaunchEnvironment(3, 4, 1, "srun", "gpu003", found.master_port)


def test_srun_counts_the_step_not_the_job() -> None:
    environ = SRUN_TASK | {"SLURM_NTASKS": "16", "WORLD_SIZE": "16"}
    assert launch_environment(environ).world_size == 4


def test_master_lives_on_the_step_not_on_the_job() -> None:
    assert launch_environment(SRUN_TASK | {"SLURM_STEP_NODELIST": "gpu004"}).master_address == "gpu004"


def test_tasks_of_a_step_agree_on_the_port_and_steps_and_jobs_do_not() -> None:
    def port(job: int, step: int, rank: int = 0) -> int:
        environ = SRUN_TASK | {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_ID": str(step),
            "SLURM_PROCID": str(rank),
        }
        return launch_environment(environ).master_port

    assert len({port(7, 0, rank) for rank in range(4)}) == 1
    ports = [port(job, step) for job in range(9_990, 10_010) for step in range(20)]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= port < 30_000 for port in ports)


def test_the_users_master_wins_under_srun() -> None:
    found = launch_environment(SRUN_TASK | {"MASTER_ADDR": "gpu003-ib0", "MASTER_PORT": "4000"})
    assert (found.master_address, found.master_port) == ("gpu003-ib0", 4000)


@pytest.mark.parametrize(("visible", "local_rank"), [("0,1", 1), ("1", 0), ("", 1)])
def test_a_task_that_sees_one_gpu_uses_it(visible: str, local_rank: int) -> None:
    assert launch_environment(SRUN_TASK | {"CUDA_VISIBLE_DEVICES": visible}).local_rank == local_rank


@pytest.mark.parametrize("environ", [{}, BATCH_BODY], ids=["nothing", "sbatch body"])
def test_without_a_launcher_the_process_is_alone(environ: dict[str, str]) -> None:
    found = launch_environment(environ)
    assert found == LaunchEnvironment(0, 1, 0, "none", "127.0.0.1", found.master_port)


def test_alone_with_the_master_of_others() -> None:
    found = launch_environment(BATCH_BODY | {"MASTER_ADDR": "gpu003", "MASTER_PORT": "4000"})
    assert found.master_address == "127.0.0.1"
    assert found.master_port != 4000


@pytest.mark.parametrize(
    ("is_task_itself", "has_terminal", "launcher"),
    [(False, True, "none"), (True, True, "srun"), (False, False, "srun")],
    ids=["typed in its shell", "srun --pty python", "a step started from its shell"],
)
def test_interactive_step(
    monkeypatch: pytest.MonkeyPatch, is_task_itself: bool, has_terminal: bool, launcher: str
) -> None:
    monkeypatch.setattr(launch, "_has_terminal", lambda: has_terminal)
    environ = PTY | {"SLURM_TASK_PID": str(os.getpid() if is_task_itself else 1)}
    assert launch_environment(environ).launcher == launcher


def test_a_terminal_alone_does_not_hide_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_terminal", lambda: True)
    assert launch_environment(SRUN_TASK).launcher == "srun"


def test_whether_there_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened, to know, and closed again."""
    opened, closed = [], []

    def open_it(path: str, flags: int) -> int:
        opened.append((path, bool(flags & os.O_NOCTTY)))
        return 77

    monkeypatch.setattr(launch.os, "open", open_it)
    monkeypatch.setattr(launch.os, "close", closed.append)
    assert launch._has_terminal()
    assert (opened, closed) == ([("/dev/tty", True)], [77])

    def refuse(path: str, flags: int) -> int:
        raise OSError("no such device")

    monkeypatch.setattr(launch.os, "open", refuse)
    assert not launch._has_terminal()


@pytest.mark.parametrize(
    ("environ", "times"),
    [({}, 0), ({"TORCHELASTIC_RESTART_COUNT": "2"}, 2), ({"SLURM_RESTART_COUNT": "1"}, 1)],
)
def test_how_often_the_ranks_were_started_before(
    environ: dict[str, str], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert launch.restarts() == times


@pytest.mark.parametrize("environ", [SRUN_TASK, {"RANK": "7", "KEPT": "x"}, {}], ids=["srun", "set", "empty"])
def test_published_for_others_as_long_as_it_is_asked_for(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    found = launch_environment(SRUN_TASK)
    with found.published():
        assert launch_environment() == replace(found, launcher="deepspeed or torchrun")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu003", "gpu003"),
        ("a,b", "a"),
        ("gpu[003-007,012]", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("gpu[12,003-007],login", "gpu12"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("rack[1,4]-n01-ib,b[1-2]", "rack1-n01-ib"),
        ("node-1.cluster.example,node-2.cluster.example", "node-1.cluster.example"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", ",a", "gpu[", "gpu[003-", "gpu]3", "gpu[]", "gpu[x-y]", "(null) "])
def test_an_unreadable_node_list(node_list: str) -> None:
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host(node_list)


def _without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            _without(TORCHRUN, "WORLD_SIZE"),
            "WORLD_SIZE is not set: set by deepspeed and torchrun; unset RANK",
        ),
        (TORCHRUN | {"RANK": "two"}, "RANK is 'two', not a non-negative integer: .*unset RANK"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1', not a non-negative integer"),
        (TORCHRUN | {"RANK": ""}, "RANK is '', not a non-negative integer"),
        (TORCHRUN | {"WORLD_SIZE": "8.0"}, "WORLD_SIZE is '8.0'"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 but WORLD_SIZE is 8: ranks count from 0 to 7"),
        (
            _without(TORCHRUN, "MASTER_ADDR"),
            "MASTER_ADDR is not set but WORLD_SIZE is 8: .*where rank 0 listens",
        ),
        (_without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set but WORLD_SIZE is 8"),
        (
            TORCHRUN | {"MASTER_PORT": "http"},
            "MASTER_PORT is 'http', not a non-negative integer: set it to a free",
        ),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0, not in 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, not in 1 to 65535"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is '8' but RANK is not set: .*unset WORLD_SIZE"),
        (_without(SRUN_TASK, "SLURM_PROCID"), "SLURM_PROCID is not set: set by srun"),
        (SRUN_TASK | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, r"SLURM_STEP_NUM_TASKS is '4\(x2\)'"),
        (SRUN_TASK | {"SLURM_PROCID": "4"}, "SLURM_PROCID is 4 but SLURM_STEP_NUM_TASKS is 4"),
        (_without(SRUN_TASK, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR to the host"),
        (SRUN_TASK | {"SLURM_STEP_NODELIST": "gpu["}, r"cannot read the node list 'gpu\['"),
        (_without(SRUN_TASK, "SLURM_JOB_ID"), "SLURM_JOB_ID is not set: set MASTER_PORT to a free port"),
    ],
)
def test_a_broken_environment_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_environment(environ)


def of_hosts_file(*addresses: str) -> object:
    """What getaddrinfo gives for a name."""

    def resolve(_: str, port: int, **__: object) -> list[object]:
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(kind, 1, 6, "", (address, port)) for kind, address in zip(kinds, addresses, strict=True)]

    return resolve


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "::1", "localhost"])
def test_listens_where_ranks_meet_and_nowhere_else(address: str) -> None:
    with listening_socket(address, 0) or pytest.fail("no socket") as listening:
        assert listening.getsockname()[0] in ("127.0.0.1", "::1", address)
        taken = listening.getsockname()[1]
        assert listening_socket(address, taken) is None, "torch says so in its words"


def test_an_address_that_no_interface_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", of_hosts_file("192.0.2.1"))
    assert listening_socket("service", 0) is None
    monkeypatch.setattr(socket, "getaddrinfo", of_hosts_file("192.0.2.1", "0.0.0.0"))
    with listening_socket("both", 0) or pytest.fail("no socket") as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


def test_a_loopback_address_of_this_host_alone_would_shut_the_others_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", of_hosts_file("127.0.1.1"))
    assert listening_socket("gpu003", 0) is None


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert listening_socket("nowhere", 0) is None
