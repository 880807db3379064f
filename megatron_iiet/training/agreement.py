"""One view of a run's folder: the main rank decides, and every other compares what its own host shows it."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_iiet.config import ConfigError
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.integrity import DamagedError
from megatron_iiet.storage.selection import Candidates, find_candidates, no_candidate, seen_here
from megatron_iiet.training.stopping import failing_together

PATIENCE_SECONDS = 8.0
"""How long another host may take to see what the main rank's has: network file systems keep what they saw for
some seconds."""
_POLL_SECONDS = 0.25
_LOOKED_INTO = 4
"""Checkpoints whose states are compared; of a thousand, every rank of a thousand would read them all."""
_REMEDY = "choose one on a file system that all hosts share"


class Succession:
    """The checkpoints that a start may go on from, in order; on every rank the same."""

    def __init__(self, output_dir: str, context: ParallelContext) -> None:
        """Every rank calls it.

        Raises:
            ConfigError: the ranks do not see the same folder, or ``latest`` is none.
        """
        self._output_dir, self._context = output_dir, context
        found = Candidates()
        with failing_together(context):
            if context.is_main:
                found = find_candidates(output_dir)
        self.candidates = context.world.gather_objects(found)[0]
        _compare_views(output_dir, self.candidates.tags[:_LOOKED_INTO], context)
        self.told: list[str] = list(self.candidates.notes)
        """What there is to say of those that were left out."""

    def newest(self) -> Path | None:
        """The first checkpoint left, of which nothing is wrong that can be seen without reading all of it;
        None where there never was one. Every rank calls it.

        Raises:
            ConfigError: there are checkpoints, but none is whole.
        """
        while self.candidates.tags:
            folder = checkpoint.checkpoints_folder(self._output_dir) / self.candidates.tags[0]
            try:
                with failing_together(self._context):
                    if self._context.is_main:
                        checkpoint.check_whole(folder)
            except DamagedError as error:
                self.leave_out(error)
            else:
                return folder
        if self.candidates.began:
            raise no_candidate(self._output_dir, self.candidates, self.told)
        return None

    def leave_out(self, error: DamagedError) -> str:
        """The first checkpoint left is damaged; a sentence about that."""
        tag = self.candidates.tags.pop(0)
        self.told.append(f"{tag} is left out: {error}")
        return self.told[-1]


def check_shared(output_dir: str, context: ParallelContext) -> None:
    """Refuse an ``output_dir`` that is another folder on another host. Every rank calls it; the main one can
    write there, which was tried before.

    Raises:
        ConfigError: naming the hosts whose processes do not see a file that the main rank made there.
    """
    if context.world_size == 1:
        return
    folders = [Path(output_dir).absolute(), *Path(output_dir).absolute().parents]
    level = next(n for n, folder in enumerate(folders) if folder.is_dir())
    level, name = context.world.gather_objects((level, f".probe-{secrets.token_hex(8)}"))[0]
    probe = folders[min(level, len(folders) - 1)] / name  # mounted elsewhere, it is the same folder
    with failing_together(context):
        if context.is_main:
            probe.touch()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    views = context.world.gather_objects((socket.gethostname(), seen))
    if context.is_main:
        probe.unlink(missing_ok=True)
    blind = {rank: host for rank, (host, seen) in enumerate(views) if not seen}
    if blind:
        raise ConfigError(
            f"output_dir {output_dir} is not the same folder on all hosts: what rank 0 on "
            f"{views[0][0]} writes there, {_ranks(blind)} cannot see; {_REMEDY}"
        )


def _compare_views(output_dir: str, looked_into: Sequence[str], context: ParallelContext) -> None:
    if context.world_size == 1:
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        late = time.monotonic() > deadline
        views = context.world.gather_objects((socket.gethostname(), seen_here(output_dir, looked_into), late))
        others = {rank: host for rank, (host, seen, _) in enumerate(views) if seen != views[0][1]}
        if not others:
            return
        if views[0][2]:
            break
        time.sleep(_POLL_SECONDS)
    rank = next(iter(others))
    here, there = views[0][1], views[rank][1]
    name = next(name for name in sorted({*here, *there}) if here.get(name) != there.get(name))
    raise ConfigError(
        f"output_dir {output_dir} is not the same folder on all hosts: rank 0 on "
        f"{views[0][0]} sees {_seen(here, name)}, but {_ranks(others)} {_seen(there, name)}; {_REMEDY}"
    )


def _seen(view: dict[str, str], name: str) -> str:
    if name not in view:
        return f"no {name} there" if name == checkpoint.LATEST else f"no complete {name} there"
    if name == checkpoint.LATEST:
        return f"a 'latest' that names {view[name][:80]!r}"
    return f"a {name} whose state has digest {view[name][:8]}"


def _ranks(hosts: dict[int, str]) -> str:
    first = next(iter(hosts))
    more = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
    return f"rank {first} on {hosts[first]}{more}"
