"""How ranks meet, beside what ranks before them have left, and whom they name when they lose each other."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_iiet.parallel import meeting as meeting_module
from megatron_iiet.parallel.launch import LaunchEnvironment
from megatron_iiet.parallel.meeting import LostConnectionError, Meeting, Member, meet

GLOO = (
    "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.{}]:13990. This is typically"
)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of torchrun's agent, which it keeps when it starts ranks again."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def all_meet(port: int, size: int, *, seconds: float = 60, absent: tuple[int, ...] = ()) -> list[Any]:
    def one(rank: int) -> Any:
        environment = LaunchEnvironment(rank, size, rank, "deepspeed or torchrun", "127.0.0.1", port)
        try:
            return meet(environment, timedelta(seconds=seconds))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, [rank for rank in range(size) if rank not in absent]))


def test_every_start_is_another_beside_what_the_ones_before_left(agent: dist.TCPStore) -> None:
    """Of two starts with one restart count, as torchrun's agents have where a host has come back; a rank of
    the first was killed after its greeting."""
    agent.set("hello 1", "of a dead one")
    first, again = (all_meet(agent.port, 3) for _ in range(2))
    for ranks in (first, again):
        assert [m.rank for m in ranks] == [0, 1, 2]
        assert {member.host for m in ranks for member in m.members} == {socket.gethostname()}
        ranks[0].store.set("key", "value")
        assert ranks[2].store.get("key") == b"value"
        ranks[0].store.set(f"only {id(ranks)}", "")
    assert not again[1].store.check([f"only {id(first)}"])


def test_who_does_not_come_is_named(agent: dist.TCPStore) -> None:
    said = all_meet(agent.port, 3, seconds=0.3, absent=(1,))
    assert said[0].startswith("rank 1 of 3 did not come: look on their hosts")
    assert said == [said[0]] * 2
    (said,) = all_meet(agent.port, 2, seconds=0.3, absent=(0,))
    assert said.startswith(
        f"rank 1 on {socket.gethostname()} has found 127.0.0.1:{agent.port}, but rank 0 does"
    )


def member(host: str) -> Member:
    return Member(host, (f"10.0.0.{'abc'.index(host[-1]) + 1}",))


@pytest.fixture
def meetings() -> list[Meeting]:
    """Of four ranks on three hosts."""
    members, store = [member(host) for host in ("host-a", "host-a", "host-b", "host-c")], dist.HashStore()
    listener = socket.create_server(("127.0.0.1", 0))
    where = listener.getsockname()
    threading.Thread(target=lambda: [listener.accept() for _ in members], daemon=True).start()
    return [Meeting(rank, members, store, where) for rank in range(len(members))]


def said(meeting: Meeting, error: Exception) -> str:
    with (
        pytest.raises(type(error) if not isinstance(error, RuntimeError) else Exception) as told,
        meeting.explaining(),
    ):
        raise error
    return str(told.value)


def test_the_host_that_is_gone_is_named_not_those_that_left_because_of_it(meetings: list[Meeting]) -> None:
    """Rank 0 lost host-c; rank 2 then loses rank 0's host, and rank 1, a neighbour on the same host."""
    assert said(meetings[0], RuntimeError(GLOO.format(3))) == (
        "rank 0 on host-a has lost the connection to rank 3 on host-c (Connection closed by peer): it "
        "ended, or its host is gone; the same command goes on from the newest checkpoint"
    )
    for rank in (2, 1):
        sentence = said(meetings[rank], RuntimeError(GLOO.format(1)))
        assert f"rank {rank} on host-{'aab'[rank]} has lost the connection to rank 3 on host-c (" in sentence


def test_the_others_hear_why_a_rank_ended(meetings: list[Meeting]) -> None:
    assert said(meetings[2], MemoryError("no room\nfor this")) == "no room\nfor this"
    assert said(meetings[0], RuntimeError(GLOO.format(2))) == (
        "rank 0 on host-a ends because rank 2 on host-b did: no room"
    )


def test_whoever_waits_in_vain_names_the_silent(
    meetings: list[Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(meeting_module, "time", SimpleNamespace(sleep=slept.append))
    error = (
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
    )
    assert said(meetings[3], RuntimeError(error)).startswith(
        "rank 3 on host-c has waited 3 s for the others in vain; nothing is heard of ranks 0, 1 on host-a, "
        "rank 2 on host-b: it hangs"
    )
    assert "heard of rank 1 on host-a, rank 2 on host-b: " in said(meetings[0], RuntimeError(error))
    assert slept == [meeting_module._PAUSE_SECONDS] * 2
    late = SimpleNamespace(sleep=lambda _: said(meetings[1], MemoryError("no room")))
    monkeypatch.setattr(meeting_module, "time", late)
    assert "nothing is heard of rank 2 on host-b: " in said(meetings[3], RuntimeError(error)), "1 has left"


def test_what_is_no_lost_connection_stays_what_it_was(meetings: list[Meeting]) -> None:
    error = RuntimeError("shape '[2]' is invalid for input [of size] [3]:4")
    with pytest.raises(RuntimeError) as told, meetings[0].explaining():
        raise error
    assert told.value is error


def test_without_the_store_there_is_a_sentence() -> None:
    """It was on the host that is gone."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        where = gone.getsockname()
    meeting = Meeting(1, [member("host-a"), member("host-b")], dist.HashStore(), where)
    with (
        pytest.raises(
            LostConnectionError, match="rank 1 on host-b has lost the connection to rank 0 on host-a "
        ),
        meeting.explaining(),
    ):
        raise RuntimeError(GLOO.format(1))


def test_the_interface_that_leads_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(
        meeting_module, "_interfaces", lambda address: {"10.0.0.1": ["eth7"]}.get(address, [])
    )
    here, there = Member("localhost", ("10.0.0.1",)), Member("elsewhere", ("10.0.0.2",))
    for other in (there, Member("localhost", ("10.0.0.2",))):
        assert Meeting(0, [here, other], dist.HashStore()).variables() == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert Meeting(0, [here, here], dist.HashStore()).variables() == {}, "one host: its loopback will do"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert Meeting(0, [here, there], dist.HashStore()).variables() == {}, "the user knows better"
