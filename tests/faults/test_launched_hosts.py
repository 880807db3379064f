"""torchrun and deepspeed across hosts, which die, come back or have other clocks; `make test-hosts`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import config_from_dict, config_to_yaml
from megatron_iiet.storage import checkpoint
from tests.faults.hosts import Hosts, clock_apart, ended, why_not
from tests.faults.test_hosts import config_of, data, losses, undisturbed, what_was_learned

__all__ = ["data", "undisturbed"]
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(why_not()), reason=why_not())]
SECONDS = 240.0
"""For whatever is waited for; a start takes 10 to 60 on two busy cores."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path.parent) as two:
        yield two


def script(data: dict[str, str], run: Path, *inject: str, **training: Any) -> list[str]:
    """What the launchers start."""
    config = config_of(data, run, **training)
    config["checkpoint"]["mode"] = "sync"
    config["debug"] = {"inject": list(inject)}
    file = run.with_suffix(".yaml")
    file.write_text(config_to_yaml(config_from_dict(config)))
    return ["pretrain_iiet.py", "--config", str(file)]


def torchrun(nodes: str, *more: str) -> list[str]:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29500", "--rdzv-id", "run"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        nodes,
        "--nproc-per-node",
        "1",
        *rendezvous,
        *more,
    ]


def deepspeed(run: Path, *more: str) -> list[str]:
    file = run.with_suffix(".hosts")
    file.write_text("host-a slots=1\nhost-b slots=1\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--hostfile", str(file), "--master_addr", "host-a", *more]


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        early = [process for process in processes if process.poll() is not None]
        assert not early, early[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def at_step(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (run / "log.jsonl").is_file() and f'"step": {step},' in (run / "log.jsonl").read_text()


def starts(run: Path) -> list[tuple[list[str], int | None]]:
    lines = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    return [(sorted(line["hosts"]), line["resumed_step"]) for line in lines]


def test_torchrun_restarts_ranks_of_two_hosts(
    hosts: Hosts, data: dict[str, str], undisturbed: Path, run: Path
) -> None:
    """The agent of the host whose rank was killed counts a restart; the other one may count none."""
    command = [*torchrun("2", "--max-restarts", "1"), *script(data, run, "kill@step=4,rank=0")]
    for status, _, errors in ended([hosts.run(n, *command) for n in (0, 1)], SECONDS):
        assert status == 0, errors
    assert what_was_learned(run) == what_was_learned(undisturbed)
    assert starts(run) == [(["host-a", "host-b"], None), (["host-a", "host-b"], 2)]


def test_deepspeed_on_each_host_of_a_hostfile_and_one_dies(
    hosts: Hosts, data: dict[str, str], undisturbed: Path, run: Path
) -> None:
    """Without ssh; the same commands go on when the host is back."""

    def launched(*inject: str) -> list[subprocess.Popen[str]]:
        what = script(data, run, *inject)
        return [hosts.run(n, *deepspeed(run, "--no_ssh", "--node_rank", str(n)), *what) for n in (0, 1)]

    both = launched("stop@step=4,rank=1")
    wait_for(at_step(run, 3), *both)
    hosts.kill(1)
    ((status, _, errors),) = ended(both[:1], 60)
    assert status not in (0, None)
    assert "error: rank 0 on host-a has lost the connection to rank 1 on host-b (Connection " in errors
    assert "Traceback" not in errors
    hosts.start(1)
    for status, _, errors in ended(launched(), SECONDS):
        assert status == 0, errors
    assert what_was_learned(run) == what_was_learned(undisturbed)
    assert starts(run) == [(["host-a", "host-b"], None), (["host-a", "host-b"], 2)]


@pytest.fixture
def over_ssh(hosts: Hosts, run: Path) -> list[str]:
    """The beginning of a deepspeed command that starts ranks on all hosts, each of which has an sshd."""
    if not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()):
        pytest.skip("no pdsh or sshd: apt-get install pdsh openssh-server")
    key, settings = run.with_suffix(".key"), run.with_suffix(".sshd")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    settings.write_text(_SSHD.format(key=key))
    servers = []
    for n in (0, 1):
        hosts.write(n, "/etc/ssh/ssh_config", _SSH.format(key=key))
        server = f"mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec /usr/sbin/sshd -D -f {settings}"
        servers.append(hosts.run(n, "sh", "-c", server))
    for host in hosts.hosts:
        knock = hosts.run(0, "sh", "-c", f"until ssh {host.name} true; do sleep 0.1; done")
        wait_for(lambda knock=knock: knock.poll() is not None, *servers)  # type: ignore[misc]
    return ["env", "PDSH_RCMD_TYPE=ssh", *deepspeed(run)]


_SSH = "IdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
_SSHD = "HostKey {key}\nAuthorizedKeysFile {key}.pub\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n"


def test_deepspeed_over_ssh(
    over_ssh: list[str], hosts: Hosts, data: dict[str, str], undisturbed: Path, run: Path
) -> None:
    """As its user has it: one command on one host."""
    ((status, _, errors),) = ended([hosts.run(0, *over_ssh, *script(data, run))], SECONDS)
    assert status == 0, errors
    assert what_was_learned(run) == what_was_learned(undisturbed)


def test_the_end_of_deepspeed_over_ssh_is_heard_on_all_hosts(
    over_ssh: list[str], hosts: Hosts, data: dict[str, str], run: Path
) -> None:
    """Nobody reads any more what the ranks print; nevertheless they save."""
    launcher = hosts.run(0, *over_ssh, *script(data, run, steps=1_000_000))
    wait_for(at_step(run, 3), launcher)
    hosts.signal(launcher, signal.SIGTERM)
    wait_for(lambda: not any("pretrain_iiet.py" in line for n in (0, 1) for line in hosts.processes(n)))
    assert checkpoint.latest_tag(run) == checkpoint.tag_of(max(losses(run)))


def test_torchrun_goes_on_with_the_hosts_that_are_left(
    hosts: Hosts, data: dict[str, str], undisturbed: Path, run: Path
) -> None:
    """Elastic: the survivor goes on alone, with the same batch."""
    quick = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    what = script(data, run, "stop@step=4,rank=1")

    def launched(number: int) -> subprocess.Popen[str]:
        conf = f"{quick},is_host={int(number == 0)}"
        return hosts.run(number, *torchrun("1:2", "--max-restarts", "3", "--rdzv-conf", conf), *what)

    both = [launched(n) for n in (0, 1)]
    wait_for(at_step(run, 3), *both)
    hosts.kill(1)
    ((status, _, errors),) = ended(both[:1], SECONDS)
    assert status == 0, errors
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    assert starts(run) == [(["host-a", "host-b"], None), (["host-a"], 2)]


def test_the_lock_of_a_dead_host_whose_clock_was_another(
    hosts: Hosts, data: dict[str, str], undisturbed: Path, run: Path
) -> None:
    """A day ahead and a day behind. (torchrun's c10d rendezvous takes a host whose clock is 15 s behind for
    dead, and starts without it: with such clocks hosts have to be numbered.)"""
    day = 86_400
    clocks = [clock_apart(run.parent, sign * day) for sign in (1, -1)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "host-a"]
    what = script(data, run, "stop@step=4,rank=1")
    both = [hosts.run(n, *torchrun, "--node-rank", str(n), *what, environ=clocks[n]) for n in (0, 1)]
    wait_for(at_step(run, 3), *both)
    alone = [sys.executable, *script(data, run)]
    ((status, output, errors),) = ended([hosts.run(1, *alone, environ=clocks[1])], SECONDS)
    assert status == 2, output
    assert "where another run writes, process " in errors
    assert " on host-a, started " in errors

    hosts.kill(0)
    hosts.kill(1)
    hosts.start(1)
    ((status, output, errors),) = ended([hosts.run(1, *alone, environ=clocks[1])], SECONDS)
    assert status == 0, errors
    assert " on host-a, started " in output
    assert "is taken over: it has given no sign of life for 10 s" in output
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    times = [json.loads(line)["time"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert times[0] > times[1], "the clocks were apart"


def test_a_stop_asked_of_one_hosts_launcher_is_heard_on_all(
    hosts: Hosts, data: dict[str, str], run: Path
) -> None:
    command = [*torchrun("2"), *script(data, run, steps=1_000_000)]
    both = [hosts.run(n, *command) for n in (0, 1)]
    wait_for(at_step(run, 3), *both)
    hosts.signal(both[1], signal.SIGTERM)
    (_, said, errors), _ = ended(both, 60)
    assert "stopping on SIGTERM; the same command goes on from here" in said, errors
    last = max(losses(run))
    assert checkpoint.latest_tag(run) == checkpoint.tag_of(last)
    assert hosts.processes(0) == hosts.processes(1) == []
