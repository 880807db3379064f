"""Which rank a run that gets no further waits for, from what all ranks say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_iiet.training.progress import Activity, Progress

_BUSY_BEATS = 5
"""Beats that a rank of a busy machine may miss."""
_WARNED_SHARE = 0.5
"""Of a bound: then there is a warning."""


@dataclass(frozen=True)
class Pulse:
    """What a rank says of itself, once a beat."""

    host: str
    pid: int
    start: int
    """When the process was started, in ticks of its host: an id is used again."""
    beat: int = 0
    activity: str = Activity.START
    step: int = 0
    count: int = 0
    """How many activities there were: it grows while the rank gets on."""
    place: str = ""
    """Where in this package its main thread is."""
    waits: bool = False
    """Whether one of its threads is in a call of torch.distributed."""
    collectives: Mapping[str, int] = field(default_factory=dict)
    """Collectives begun, by process group; of a rank that gets no further."""
    ended: bool = False
    """Whether it has written what it was at, and goes."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Verdict:
    """Why a run ends."""

    sentence: str
    silent: tuple[Pulse, ...] = ()
    """The last words of those who give no sign of life."""
    folder: str = ""
    """Where every rank writes what it was at."""


class Judge:
    """Looks at the pulses of all ranks, once a beat."""

    def __init__(self, progress: Progress, beat_seconds: float) -> None:
        """``progress``: of this process, which knows how long a step takes."""
        self._progress, self._busy = progress, _BUSY_BEATS * beat_seconds
        self._beats: dict[int, tuple[int, float]] = {}
        self._counts: dict[int, tuple[int, float]] = {}
        self._warned: tuple[int, int] | None = None
        self.warning = ""
        """What may become a verdict, once."""

    def look(self, pulses: Mapping[int, Pulse], now: float) -> Verdict | None:
        """Why the run must end, as of second ``now``; None if it need not."""
        self.warning = ""
        for rank, pulse in pulses.items():
            _note(self._beats, rank, pulse.beat, now)
            _note(self._counts, rank, pulse.count, now)
        share, rank = max((self._share(rank, pulse, now), rank) for rank, pulse in pulses.items())
        if share < _WARNED_SHARE:
            self._warned = None
            return None
        told, silent = self._culprits(pulses, rank, now)
        activity = Activity.STEP if silent else Activity(pulses[rank].activity)
        bound = self._progress.silence if silent else self._progress.bound(activity)
        because = f"the bound is {bound:.4g} s, {self._progress.why(activity)}"
        if share >= 1:
            return Verdict(f"{told} ({because})", tuple(pulses[r] for r in silent))
        if self._warned != (rank, pulses[rank].count):
            self._warned = rank, pulses[rank].count
            self.warning = f"{told}; the run will end unless it goes on ({because})"
        return None

    def heard_at(self, rank: int, pulse: Pulse, now: float) -> float:
        """When a rank's heart last beat, given its newest pulse."""
        _note(self._beats, rank, pulse.beat, now)
        return self._beats[rank][1]

    def _share(self, rank: int, pulse: Pulse, now: float) -> float:
        """What a rank has used of the time that it may take, at its worst."""
        stuck = (now - self._counts[rank][1]) / self._progress.bound(Activity(pulse.activity))
        # By what this rank is at: a pulse may be from before the rank was stopped, in its start.
        if self._progress.now[0] is Activity.START:
            return stuck
        return max(stuck, self._silence_of(rank, now) / self._progress.silence)

    def _silence_of(self, rank: int, now: float) -> float:
        """Seconds without a sign of life, if they are more than a busy machine explains."""
        age = now - self._beats[rank][1]
        return age if age >= self._busy else 0.0

    def _culprits(self, pulses: Mapping[int, Pulse], late: int, now: float) -> tuple[str, tuple[int, ...]]:
        """A clause that names whom the others wait for, and those of them that give no sign of life;
        ``late``: the rank that took longest."""
        silent = tuple(rank for rank in pulses if self._silence_of(rank, now))
        if silent:
            first, step = pulses[silent[0]], max(pulse.step for pulse in pulses.values())
            age = max(self._silence_of(rank, now) for rank in silent)
            return (
                f"{_name(silent)} ({first}) gave no sign of life for {age:.0f} s in step {step}: it is "
                "stopped, or its host is gone"
            ), silent
        at = f"for {now - self._counts[late][1]:.0f} s in step {pulses[late].step}"
        behind = behind_in(pulses)
        busy = [rank for rank, pulse in pulses.items() if not pulse.waits]
        ranks = [rank for rank in busy if rank in behind] or busy or list(behind)
        if not ranks:
            return f"all ranks wait for each other {at}, the first at {pulses[late].place}", ()
        first, why = pulses[ranks[0]], ""
        if ranks[0] in behind:
            why = ", and has begun {1} collectives of process group {0}, others {2}".format(*behind[ranks[0]])
        elif len(ranks) < len(pulses):
            why = ", and the others wait for it"
        return f"{_name(ranks)} ({first}) got no further {at}: it is at {first.place}{why}", ()


def behind_in(pulses: Mapping[int, Pulse]) -> dict[int, tuple[str, int, int]]:
    """The ranks that have begun fewer collectives of a process group than others of it: its name, how many
    they have begun, and how many the others."""
    behind: dict[int, tuple[str, int, int]] = {}
    for group in sorted({name for pulse in pulses.values() for name in pulse.collectives}):
        counts = {r: pulse.collectives[group] for r, pulse in pulses.items() if group in pulse.collectives}
        most = max(counts.values())
        behind.update({r: (group, n, most) for r, n in counts.items() if n < most and r not in behind})
    return behind


def _note(seen: dict[int, tuple[int, float]], rank: int, value: int, now: float) -> None:
    """When a value was last another."""
    if rank not in seen or seen[rank][0] != value:
        seen[rank] = value, now


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
