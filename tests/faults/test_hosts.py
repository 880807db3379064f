"""Runs across hosts with a network, a name, processes and a /tmp of their own: ``tests/faults/hosts.py``."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.parallel import ParallelContext, meeting
from megatron_iiet.storage import checkpoint
from megatron_iiet.training import agreement
from megatron_iiet.training.lock import RunLock
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.faults.hosts import Hosts, on_hosts, why_not
from tests.tiny import make_data, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of one host."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(pretrain_rank, 2, config_of(data, folder / "run"), ds_json(folder, 1))
    return folder / "run"


@pytest.fixture
def hosts(tmp_path: Path, data: dict[str, str]) -> Iterator[Hosts]:
    with Hosts(tmp_path.parent) as two:
        yield two


def config_of(data: dict[str, str], run: Path, **training: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "training": {"steps": STEPS, **training},
        "checkpoint": {"interval": 2, "keep": 0},
    }
    return as_data(tiny_config(data, run, **sections))


def losses(run: Path) -> dict[int, float]:
    return {step: values["loss"] for step, values in read_log(run).items() if "loss" in values}


def what_was_learned(run: Path) -> tuple[dict[int, float], Any]:
    """Losses, and digests of the last weights and moments."""
    index = checkpoint.checkpoints_folder(run) / checkpoint.tag_of(STEPS) / "index.json"
    return losses(run), json.loads(index.read_text())["files"]


def when(condition: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something is so, in time or never."""

    def wait() -> None:
        until = time.monotonic() + 180.0
        while not condition():
            if time.monotonic() > until:
                return
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def pretrain_or_say(config: dict[str, Any], ds_path: Path) -> str:
    """What it failed with."""
    agreement.PATIENCE_SECONDS = 0.5
    try:
        pretrain_rank(config, ds_path)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unplug(hosts: Hosts, number: int) -> None:
    hosts.link(number, up=False)
    time.sleep(1.0)
    hosts.link(number, up=True)


def test_two_hosts_train_what_one_does_and_so_does_what_is_left(
    hosts: Hosts, data: dict[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    """Each calls itself 127.0.1.1, as Debian has it, where others find nobody; the link is slow, and out for
    a second. Then one is taken away: the same batch, with twice the accumulation."""
    run, ds_path = tmp_path / "run", ds_json(tmp_path, 1)
    for me in (0, 1):
        others = "".join(f"{h.address} {h.name}\n" for h in hosts.hosts if h.number != me)
        hosts.write(me, "/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {hosts[me].name}\n{others}")
    hosts.slow(1, "20mbit")
    unplugged = when((run / "checkpoints/step_00000002").exists, lambda: unplug(hosts, 1))
    on_hosts(hosts, [0, 1], pretrain_rank, config_of(data, run), ds_path)
    unplugged.join()
    assert what_was_learned(run) == what_was_learned(undisturbed)

    run = tmp_path / "fewer"
    on_hosts(hosts, [0, 1], pretrain_rank, config_of(data, run, stop_after=4), ds_path)
    on_hosts(hosts, [1], pretrain_rank, config_of(data, run), ds_path)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["hosts"] for start in starts] == [["host-a", "host-b"], ["host-b"]]


@pytest.mark.parametrize(("victim", "ranks", "grid"), [(0, 2, {"pipeline": 2}), (1, 4, {"tensor": 2})])
def test_a_host_that_dies_is_named(
    victim: int, ranks: int, grid: dict[str, int], hosts: Hosts, data: dict[str, str], tmp_path: Path
) -> None:
    """With the first one goes the store in which the ranks have met."""
    run = tmp_path / "run"
    config = config_of(data, run, steps=1_000_000) | {"parallel": grid}
    config["logging"] |= {"interval": 1, "tensorboard": False, "solver_interval": 0}
    log = run / "log.jsonl"
    killer = when(lambda: log.is_file() and log.read_text().count("\n") > 4, lambda: hosts.kill(victim))
    places = [rank * 2 // ranks for rank in range(ranks)]
    said = on_hosts(hosts, places, pretrain_or_say, config, ds_json(tmp_path, 1))
    killer.join()
    for rank, place in enumerate(places):
        if place == victim:
            assert said[rank] is None
        else:
            lost = f"rank {rank} on {hosts[place].name} has lost the connection to ranks? .* on "
            assert re.match(f"LostConnectionError: {lost}{hosts[victim].name} \\(", said[rank]), said


def test_a_folder_that_is_not_shared(hosts: Hosts, data: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    hosts.unshare(1, run)
    said = on_hosts(hosts, [0, 1], pretrain_or_say, config_of(data, run), ds_json(tmp_path, 1))
    assert said[0] == said[1]
    assert "what rank 0 on host-a writes there, rank 1 on host-b cannot see" in said[0]
    assert list(run.iterdir()) == []


def hold(run: Path) -> None:
    lock = RunLock(run, say=lambda text: None, interval=0.5)
    lock.take()
    (run / "held").touch()
    time.sleep(600)


def take(run: Path) -> tuple[str, list[str]]:
    """What a start is told, while the holder lives and after its end."""
    while not (run / "held").exists():
        time.sleep(0.02)
    said: list[str] = []
    with pytest.raises(ValueError) as refused:
        RunLock(run, say=said.append, interval=0.5).take()
    (run / "refused").touch()
    while (run / "held").exists():
        time.sleep(0.02)
    lock = RunLock(run, say=said.append, interval=0.5)
    lock.take()
    lock.release()
    return str(refused.value), said


def test_a_lock_of_another_host(hosts: Hosts, tmp_path: Path) -> None:
    """Its process ids say nothing here; its heart does."""

    def end() -> None:
        hosts.kill(0)
        (tmp_path / "held").unlink()

    killer = when((tmp_path / "refused").exists, end)
    refused, said = on_hosts(hosts, [0, 1], first_holds_second_takes, tmp_path)[1]
    killer.join()
    assert "where another run writes, process " in refused
    assert " on host-a, started " in refused
    assert said[-1].endswith("is taken over: it has given no sign of life for 1 s")


def first_holds_second_takes(run: Path) -> Any:
    return hold(run) if os.environ["RANK"] == "0" else take(run)


def wait_in_vain(folder: Path) -> str:
    """What a rank is told whose link goes down between two reductions."""
    meeting._LAST_WORDS_SECONDS, meeting._PAUSE_SECONDS = 1.0, 0.5
    try:
        with ParallelContext.start(ParallelConfig(timeouts={"start": 10, "save": 10})) as context:
            context.world.all_reduce(torch.ones(2))
            (folder / f"met {context.rank}").touch()
            while not (folder / "down").exists():
                time.sleep(0.02)
            context.world.all_reduce(torch.ones(2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_link_that_drops(hosts: Hosts, tmp_path: Path) -> None:
    def drop() -> None:
        hosts.link(1, up=False)
        (tmp_path / "down").touch()

    dropping = when(lambda: len(list(tmp_path.glob("met ?"))) == 2, drop)
    said = on_hosts(hosts, [0, 1], wait_in_vain, tmp_path)
    dropping.join()
    for me, other in ((0, 1), (1, 0)):
        assert said[me].startswith(
            f"LostConnectionError: rank {me} on {hosts[me].name} has waited 10 s for the others in vain; "
            f"nothing is heard of rank {other} on {hosts[other].name}: it hangs, or the link to its host is "
        )
