"""How the ranks of a start meet, on one host or several, and who is gone when they lose each other."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from megatron_iiet.parallel.launch import LaunchEnvironment, listening_socket

_POLL_SECONDS = 0.02
_LAST_WORDS_SECONDS = 5.0
"""How long a rank that ends may take to say so and to hear others: their store may be gone as well."""
_PAUSE_SECONDS = 2.0
_WAITED = re.compile(r"gloo/transport/.*\] Timed out waiting (?P<ms>\d+)ms")
_LOST = re.compile(
    r"gloo/transport/.*\] (?P<what>.*?) ?\[(?P<address>[0-9a-fA-F.:]+)\]:\d+(?:: (?P<why>[^.]*))?"
)
_GRACE = timedelta(seconds=5)
_LISTED = 8


class LostConnectionError(ConnectionError):
    """Another rank, or its host, is gone; one sentence that names it."""


@dataclass(frozen=True)
class Member:
    """A rank as the others know it."""

    host: str
    addresses: tuple[str, ...] = ()
    """Of its host; the first is that by which it reaches rank 0."""

    @property
    def place(self) -> tuple[str, ...]:
        """The same for ranks of one host."""
        return self.host, *self.addresses[:1]


@dataclass(frozen=True)
class Meeting:
    """The ranks of one start, on every rank the same."""

    rank: int
    members: Sequence[Member]
    """By rank."""
    store: dist.Store
    """Theirs alone: in torchrun's there is what ranks before them have left."""
    where: tuple[str, int] = ("", 0)
    """Address and port of the store."""

    @property
    def hosts(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(member.host for member in self.members))

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside the block, a lost connection is told as the loss of a host or rank, and the others hear why
        this rank ends.

        Raises:
            LostConnectionError: instead of what torch raised.
        """
        try:
            yield
        except Exception as error:
            sentence = self._why(error)
            if sentence is None:
                raise
            raise LostConnectionError(sentence) from error

    def _why(self, error: Exception) -> str | None:
        """A sentence, if a connection was lost; what else went wrong is left for the others to read."""
        text = str(error) if isinstance(error, RuntimeError) else ""
        if len(self.members) == 1:
            return None
        if "connectFullMesh" in text:
            return (
                f"{self._name(self.rank)} cannot reach the other ranks ({_first_line(error)}); name the "
                "network interface that leads to the other hosts: GLOO_SOCKET_IFNAME=eth0"
            )
        if (waited := _WAITED.search(text)) is not None:
            return self._in_vain(int(waited["ms"]) / 1000)
        if (lost := _LOST.search(text)) is not None:
            return self._lost(self._host_of(lost["address"]), lost["why"] or lost["what"])
        self._exchange({"why": _first_line(error), "blames": ""})
        return None

    def _lost(self, host: str, what: str) -> str:
        me, notes = self._name(self.rank), self._exchange({"why": what, "blames": host})
        for rank, note in sorted(notes.items()):
            if not note["blames"]:
                return f"{me} ends because {self._name(rank)} did: {note['why']}"
        seen: set[str] = set()
        while host not in seen:  # who left because of another did not cause it
            seen.add(host)
            host = next((n["blames"] for r, n in notes.items() if self.members[r].host == host), host)
        gone = [r for r in self._silent(notes) if self.members[r].host == host]
        return (
            f"{me} has lost the connection to {_listed(gone)} on {host} ({what}): it ended, or its host is "
            "gone; the same command goes on from the newest checkpoint"
        )

    def _in_vain(self, seconds: float) -> str:
        waited = f"has waited {seconds:g} s for the others in vain"
        silent = self._silent(self._exchange({"why": waited, "blames": ""}, pause=_PAUSE_SECONDS))
        hosts = {host: [r for r in silent if self.members[r].host == host] for host in self.hosts}
        named = ", ".join(f"{_listed(ranks)} on {host}" for host, ranks in hosts.items() if ranks)
        return (
            f"{self._name(self.rank)} {waited}; nothing is heard of {named or 'what they waited for'}: it "
            "hangs, or the link to its host is down; the same command goes on from the newest checkpoint"
        )

    def _silent(self, notes: Mapping[int, object]) -> list[int]:
        return [rank for rank in range(len(self.members)) if rank != self.rank and rank not in notes]

    def _host_of(self, address: str) -> str:
        for member in self.members:
            if address in member.addresses:
                return member.host
        return self.members[self.rank].host  # a loopback address

    def _exchange(self, note: dict[str, str], pause: float = 0.0) -> dict[int, dict[str, str]]:
        """Leave this rank's last words, and read those of the others; what cannot be had is left out.
        ``pause``: for those who leave theirs now."""
        found: dict[int, dict[str, str]] = {}

        def exchange() -> None:
            with suppress(RuntimeError, OSError):  # the store is gone too; torch would tell that at length
                socket.create_connection(self.where).close()
                self.store.set(f"left {self.rank}", json.dumps(note))
                time.sleep(pause)
                for rank in range(len(self.members)):
                    if rank != self.rank and self.store.check([key := f"left {rank}"]):
                        found[rank] = json.loads(self.store.get(key))

        thread = threading.Thread(target=exchange, name="last words", daemon=True)
        thread.start()
        thread.join(_LAST_WORDS_SECONDS)
        return dict(found)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.members[rank].host}"

    def variables(self) -> dict[str, str]:
        """What gloo has to be told of the network: the interface, where this host's own name would lead it to
        an address that other hosts cannot reach (Debian's /etc/hosts: 127.0.1.1)."""
        own = self.members[self.rank]
        # By address, too: machines made of one image may all be called localhost.
        others = [m.addresses[0] for m in self.members if m.addresses and m.place != own.place]
        if "GLOO_SOCKET_IFNAME" in os.environ or not others or not _is_loopback(own.host):
            return {}
        reached = [*own.addresses[:1], _address_towards(others[0], 1)]
        names = [name for a in reached if a and not _is_loopback(a) for name in _interfaces(a)]
        return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def meet(environment: LaunchEnvironment, timeout: timedelta) -> Meeting:
    """Wait until all ranks of this start are there. Every rank calls it.

    torchrun's agents keep their store when they start ranks again, and count starts each for itself, not at
    all where a host has joined or left: so every rank greets rank 0 with a number of its own, and rank 0
    answers with the number of this start.

    Raises:
        ValueError: some do not come, or rank 0 does not.
        dist.DistNetworkError: its port cannot be reached, or another has it.
    """
    rank, size = environment.rank, environment.world_size
    where = environment.master_address, environment.master_port
    if size == 1:
        return Meeting(rank, [Member(socket.gethostname())], dist.HashStore())
    has_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    own = listening_socket(*where) if has_it else None  # torch's would listen on all interfaces
    store = dist.TCPStore(
        *where,
        world_size=size,
        is_master=has_it,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if own is None else own.detach(),  # which torch closes
    )
    me = Member(socket.gethostname(), _addresses(*where))
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        start = secrets.token_hex(8)
        told = _welcome(store, start, me, size, deadline)
        store.set(f"{start} told", json.dumps(told))
    else:
        start = _greet(store, rank, deadline, where)
        store.set(f"{start} {rank}", json.dumps([me.host, me.addresses]))
        with suppress(RuntimeError):  # not in time
            store.wait([f"{start} told"], timeout + _GRACE)
        if not store.check([f"{start} told"]):
            raise ValueError(_no_answer(rank, where))
        told = json.loads(store.get(f"{start} told"))
    if isinstance(told, str):
        raise ValueError(told)
    members = [Member(host, tuple(addresses)) for host, addresses in told]
    return Meeting(rank, members, dist.PrefixStore(start, store), where)


def _welcome(store: dist.Store, start: str, me: Member, size: int, deadline: float) -> list[Any] | str:
    """Answer whoever greets, until all have come; host and addresses of each, or a sentence about who does
    not come. A greeting may be of a rank that is dead by now."""
    answered: dict[int, bytes] = {}
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"{start} {rank}"]):
                missing.remove(rank)
            elif store.check([key := f"hello {rank}"]) and answered.get(rank) != (hello := store.get(key)):
                store.set(f"welcome {rank}", f"{hello.decode()} {start}")
                answered[rank] = hello
        if missing and time.monotonic() > deadline:
            return (
                f"{_listed(sorted(missing))} of {size} did not come: look on their hosts for why they ended "
                "or were not started"
            )
        time.sleep(_POLL_SECONDS if missing else 0)
    others = [json.loads(store.get(f"{start} {rank}")) for rank in range(1, size)]
    return [[me.host, me.addresses], *others]


def _greet(store: dist.Store, rank: int, deadline: float, where: tuple[str, int]) -> str:
    """The number of this start, which rank 0 answers with."""
    hello, key = secrets.token_hex(8), f"welcome {rank}"
    store.set(f"hello {rank}", hello)
    while not store.check([key]) or not (answer := store.get(key).decode()).startswith(hello):
        if time.monotonic() > deadline:
            raise ValueError(_no_answer(rank, where))
        time.sleep(_POLL_SECONDS)
    return answer.split()[1]


def _no_answer(rank: int, where: tuple[str, int]) -> str:
    return (
        f"rank {rank} on {socket.gethostname()} has found {where[0]}:{where[1]}, but rank 0 does not answer "
        "there: look on its host for why it ended"
    )


def _address_towards(host: str, port: int) -> str:
    """This host's address on the way to another one; "" if there is no way. Nothing is sent."""
    with suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return ""


def _addresses(master: str, port: int) -> tuple[str, ...]:
    """Of this host: first the one towards rank 0, then all by which others may know it."""
    all_of_them = [
        entry.address.split("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    known = [_address_towards(master, port), *(a for a in all_of_them if not _is_loopback(a))]
    return tuple(dict.fromkeys(filter(None, known)))


def _interfaces(address: str) -> list[str]:
    return [n for n, entries in psutil.net_if_addrs().items() if any(e.address == address for e in entries)]


def _is_loopback(host: str) -> bool:
    """Whether a name or address is this host's for itself only; also where a name is none."""
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(address).split("%")[0]).is_loopback


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0][:300]


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) < 2:
        return f"rank {ranks[0]}" if ranks else "a rank"
    more = f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else ""
    return f"ranks {', '.join(map(str, ranks[:_LISTED]))}{more}"
