"""One run a folder: a lock that names its holder, with a heartbeat, so that a dead one's can be told."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from megatron_iiet import durable
from megatron_iiet.signals import process

LOCK = "run.lock"
INTERVAL_SECONDS = 5.0
"""Between two beats of a holder's heart. One that is silent for two of them is taken for dead, unless it is
known better."""
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Holder:
    """The process that trains into a folder: its main rank."""

    host: str
    pid: int
    start: int
    """When it was started, in ticks since its host's boot."""
    boot: str
    """Which boot that was, and in which namespace of process ids: only there the id says anything."""
    namespace: str
    job: str
    """SLURM's id, and which of its starts; empty outside a job."""
    restart: str
    since: str
    """Date and time of the start."""
    id: str
    beat: int = 0
    """Heartbeats so far."""

    @classmethod
    def of_this_process(cls) -> Holder:
        """This process, with a new id."""
        own = process(os.getpid())
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            start=own.start if own else 0,
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            id=secrets.token_hex(8),
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Holder | None:
        """What a lock says; None if it is no lock, or not whole yet."""
        try:
            values = json.loads(content)
            holder = cls(**values)
            kinds = {name: type(value) for name, value in asdict(holder).items()}
            expected = {name: int if name in ("pid", "start", "beat") else str for name in kinds}
        except (ValueError, TypeError, RecursionError):
            return None
        return holder if kinds == expected else None

    def to_bytes(self) -> bytes:
        """A lock's content; it never gets shorter as the heart beats."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.since}"

    def lives(self, seen_by: Holder) -> bool | None:
        """Whether it runs, as another process knows; None if that cannot know."""
        here = (self.host, self.boot, self.namespace) == (seen_by.host, seen_by.boot, seen_by.namespace)
        if not (here and self.boot and self.namespace and self.start):
            return None
        found = process(self.pid)
        return found is not None and found.lives and found.start == self.start


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


class RunLock:
    """The main rank's hold on a run's folder."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        say: Callable[[str], object] = lambda text: print(text, flush=True),
        me: Holder | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        self.path = Path(output_dir) / LOCK
        self.me = me or Holder.of_this_process()
        self._say, self._clock, self._sleep, self._interval = say, clock, sleep, interval
        self._taken_by = ""
        self._held = False
        self._made: list[Path] = []
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether another process has taken the folder, as the last heartbeat found."""
        return bool(self._taken_by)

    def take(self) -> None:
        """Take the folder, which is made if need be, or wait until it is known whether somebody has it.

        Raises:
            ValueError: another run has it.
        """
        if self._held:
            return
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        while not self._place(self.path):
            content = self._content()
            why = None if content is None else self._why_dead(content)
            if why is not None and content is not None and self._succeed(content):
                holder = Holder.from_bytes(content)
                self._say(f"{self.path} of {holder or 'an unknown process'} is taken over: {why}")
                break
        self._held = True
        self._heart = threading.Thread(target=self._live, name="run lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Make sure, by looking, that the folder is still this run's.

        Raises:
            ValueError: another has taken it.
        """
        if self._held and not self._taken_by:
            with suppress(OSError):
                self._see(self._content())
        if self._taken_by:
            raise ValueError(
                f"{self.path.parent} was taken over by {self._taken_by}: this run, which was silent for too "
                "long, ends without another checkpoint"
            )

    def release(self) -> None:
        """Let go, whatever has happened; twice is once."""
        if not self._held or os.getpid() != self.me.pid:
            return
        self._held = False
        self._over.set()
        if self._heart is not None:
            self._heart.join()
        with suppress(OSError):
            holder = Holder.from_bytes(self._content() or b"")
            if holder is not None and holder.id == self.me.id:
                self.path.unlink()
            for folder in self._made:  # a start that was refused later leaves nothing
                folder.rmdir()

    def beat(self) -> None:
        """Say that this run lives. Into the file that was read: if another is put there meanwhile, it stays
        what it is."""
        try:
            with self.path.open("r+b") as file:
                self._see(file.read())
                if not self._taken_by:
                    self.me = replace(self.me, beat=self.me.beat + 1)
                    file.seek(0)
                    file.write(self.me.to_bytes())
                    durable.sync_file(file)
        except FileNotFoundError:  # removed by hand: the run goes on, and so does the lock
            self._place(self.path)

    def _live(self) -> None:
        told = False
        while not self._over.wait(self._interval) and not self._taken_by:
            try:
                self.beat()
                told = False
            except OSError as error:
                if not told:
                    self._say(f"warning: {self.path} cannot be kept ({error}); another start may take it")
                told = True

    def _see(self, content: bytes | None) -> None:
        holder = Holder.from_bytes(content or b"")
        if holder is not None and holder.id != self.me.id:
            self._taken_by = str(holder)

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _place(self, path: Path) -> bool:
        """Make a file with this process's name in it; False if there is one already."""
        own = path.with_name(f".{path.name}.{self.me.id}")
        try:
            own.write_bytes(self.me.to_bytes())
            try:
                os.link(own, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links; for a moment the file is empty
                with path.open("xb") as file:
                    file.write(self.me.to_bytes())
            return True
        except FileExistsError:
            return False
        finally:
            own.unlink(missing_ok=True)

    def _why_dead(self, content: bytes) -> str | None:
        """Why the holder of a lock is none any more; None if the lock is gone.

        Raises:
            ValueError: it lives.
        """
        holder = Holder.from_bytes(content)
        if holder is not None:
            if holder.job and holder.job == self.me.job and holder.restart != self.me.restart:
                return f"it is of an earlier start of SLURM job {holder.job}"
            lives = holder.lives(self.me)
            if lives is False:
                return "that process is gone"
            if lives:
                raise ValueError(self._refusal(holder))
        seconds = 2 * self._interval
        self._say(
            f"{self.path} is of {holder or 'an unknown process'}; waiting up to {seconds:.0f} s for a sign "
            "of its life"
        )
        deadline = self._clock() + seconds
        while self._clock() < deadline:
            self._sleep(_LOOK_SECONDS)
            now = self._content()
            if now is None:
                return None
            if now != content:
                raise ValueError(self._refusal(Holder.from_bytes(now) or holder))
        return f"it has given no sign of life for {seconds:.0f} s"

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"output_dir is {self.path.parent}, where another run writes, {holder or 'an unknown process'}; "
            "wait for its end or stop it, or choose another output_dir"
        )

    def _succeed(self, content: bytes) -> bool:
        """Put this process in the place of a dead one; False if the lock is no longer what it was, or
        somebody else is at it. One start only may succeed each holder: a claim in its name sees to that."""
        claim = self.path.with_name(f"{LOCK}.{sha256(content).hexdigest()[:16]}")
        if not self._place(claim):
            self._wait_for_claim(claim)
            return False
        try:
            if self._content() != content:
                return False
            own = self.path.with_name(f".{LOCK}.{self.me.id}")
            own.write_bytes(self.me.to_bytes())
            own.replace(self.path)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _wait_for_claim(self, claim: Path) -> None:
        """A claim is held for a moment; one that stays is of a process that was killed in it."""
        deadline = self._clock() + 2 * self._interval
        while claim.exists():
            if self._clock() >= deadline:
                claim.unlink(missing_ok=True)
            self._sleep(_LOOK_SECONDS / 5)
