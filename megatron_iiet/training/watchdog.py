"""Ends a run that hangs, and says which rank is to blame.

Every rank has two threads for it. One exchanges notes with the main rank, over the store that the ranks met
at; the other looks at the clock, so that a store which does not answer is noticed too. The main rank judges
all; the others judge whether the main rank is still there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

import megatron_iiet
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.signals import process
from megatron_iiet.training.judge import Judge, Pulse, Verdict
from megatron_iiet.training.progress import Activity, Progress

BEAT_SECONDS = 1.0
FOLDER = "hangs"
"""In a run's: what its ranks were at when it was ended."""
_LOST_SECONDS = 15.0
"""What a rank may take to end in order once its connection to the main rank is closed."""
_FAREWELL_SECONDS = 10.0
"""What writing the stacks, and waiting for those of the others, may take."""
_HELD_SECONDS = 60.0
"""How much longer a library may keep the interpreter's lock, under which no thread of ours runs."""
_ANSWER = timedelta(seconds=30)
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""torch's lists of the collectives that a process began, under the names they have in some versions."""
_NAMED_COLLECTIVES = 32
_PACKAGE = str(Path(megatron_iiet.__file__).parent)
_LIBRARY = re.compile(r"/site-packages/|/lib/python3|^<")


class Elapsed:
    """A clock that stands while its process does: what is stopped together is not late."""

    def __init__(self, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``most``: seconds between two looks that are counted."""
        self._most, self._clock, self._before, self.seconds = most, clock, clock(), 0.0

    def tick(self) -> float:
        """Seconds so far."""
        now = self._clock()
        self.seconds += min(now - self._before, self._most)
        self._before = now
        return self.seconds


class Notes:
    """What ranks leave for each other; a client of the store that nobody else waits for."""

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._store.set_timeout(_ANSWER)
        self._keys = [f"watchdog/{rank}" for rank in range(world_size)]

    def lay_out(self) -> None:
        """An empty one for every rank that has left none: who reads one that is not there waits."""
        for key in self._keys:
            self._store.compare_set(key, "", "")

    def write(self, rank: int, note: dict[str, Any]) -> None:
        """Replace a rank's note."""
        self._store.set(self._keys[rank], json.dumps(note))

    def read(self, rank: int) -> dict[str, Any] | None:
        """A rank's note; None if it has left none."""
        text = self._store.get(self._keys[rank])
        return json.loads(text) if text else None

    def read_all(self) -> dict[int, dict[str, Any]]:
        """Those of all ranks that have left one."""
        texts = self._store.multi_get(self._keys)
        return {rank: json.loads(text) for rank, text in enumerate(texts) if text}


class Watchdog:
    """This rank's; it watches until :meth:`close`."""

    def __init__(
        self,
        context: ParallelContext,
        progress: Progress,
        output_dir: str | Path,
        *,
        beat_seconds: float = BEAT_SECONDS,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._rank, self._is_main = context.rank, context.is_main
        self._progress, self._output_dir = progress, Path(output_dir)
        self._beat_seconds, self._leave = beat_seconds, leave
        own = process(os.getpid())
        self._own = Pulse(socket.gethostname(), os.getpid(), own.start if own else 0)
        self._judge = Judge(progress, beat_seconds)
        self._clock = Elapsed(2 * beat_seconds)
        self._got_on_at = 0.0
        self._pulses: dict[int, Pulse] = {}
        """The main rank's of all, the others' of the main rank."""
        self._verdict: Verdict | None = None
        self._lost_at: float | None = None
        self._over = threading.Event()
        self._now = threading.Event()
        """Notes are exchanged without waiting for the next beat."""
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watching.start()
        self._exchanging: threading.Thread | None = None
        if context.world_size > 1 and context.store is not None:
            notes = Notes(context.store, context.world_size)
            if context.is_main:
                notes.lay_out()
            self._tell(notes)  # whoever stops before its first beat is known too
            self._exchanging = threading.Thread(
                target=self._exchange, args=(notes,), name="notes", daemon=True
            )
            self._exchanging.start()

    def close(self) -> None:
        """Watch no longer; twice is once."""
        self._over.set()
        self._now.set()
        self._watching.join()
        if self._exchanging is not None:
            # A thread that comes back from torch while the interpreter ends would abort the process. But
            # it may wait for a store that is gone.
            self._exchanging.join(_FAREWELL_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        try:
            self._watch_until_over()
        except Exception as error:  # of ours: a run need not end because nobody watches it
            faulthandler.cancel_dump_traceback_later()
            _say(f"warning: nobody watches rank {self._rank} any more: {error!r}")

    def _watch_until_over(self) -> None:
        armed_at: float | None = None
        while not self._over.wait(self._beat_seconds):
            now = self._clock.tick()
            self._own = self._look_at_self(now)
            held = self._held_seconds()
            if armed_at is None or now - armed_at >= held / 8:
                # A library that keeps the interpreter locked is seen by its silence; this tells its place.
                faulthandler.dump_traceback_later(held)
                armed_at = now
            verdict = self._judgement(now)
            if verdict is not None:
                faulthandler.cancel_dump_traceback_later()
                self._end(verdict)
                return

    def _look_at_self(self, now: float) -> Pulse:
        activity, step, count = self._progress.now
        if count != self._own.count:
            self._got_on_at = now
        place, waits = position()
        late = now - self._got_on_at >= self._progress.bound(activity) / 2
        return replace(
            self._own,
            beat=self._own.beat + 1,
            activity=activity,
            step=step,
            count=count,
            place=place,
            waits=waits,
            collectives=collectives_begun() if late else {},
        )

    def _allowed_silence(self) -> float:
        """Seconds that a process may give no sign of life, by what this one is at."""
        activity = self._progress.now[0]
        return self._progress.bound(activity) if activity is Activity.START else self._progress.silence

    def _held_seconds(self) -> float:
        return self._allowed_silence() + _HELD_SECONDS

    def _judgement(self, now: float) -> Verdict | None:
        if self._verdict is not None:
            return self._verdict
        if self._is_main:
            found = self._judge.look({**self._pulses, self._rank: self._own}, now)
            if self._judge.warning:
                _say(f"warning: {self._judge.warning}")
            return None if found is None else replace(found, folder=_folder(self._own))
        return self._judgement_of_main(now)

    def _judgement_of_main(self, now: float) -> Verdict | None:
        """Of a rank that has heard nothing from the main one, which judges otherwise."""
        pulse = self._pulses.get(0)
        if pulse is None:
            return None
        heard_at = self._judge.heard_at(0, pulse, now)
        why, allowed = "", self._allowed_silence()
        if self._lost_at is not None and now - self._lost_at >= _LOST_SECONDS:
            why = "closed its connections and is gone, and this rank did not end by itself"
        elif now - heard_at >= allowed + 3 * self._beat_seconds:
            why = f"gave no sign of life for {now - heard_at:.0f} s: it is stopped, or its host is gone"
        if not why:
            return None
        return Verdict(f"rank 0 ({pulse}) {why} (the bound is {allowed:.4g} s)", (pulse,), _folder(pulse))

    def _exchange(self, notes: Notes) -> None:
        while not self._over.is_set():
            self._now.wait(self._beat_seconds)
            self._now.clear()
            if self._over.is_set():
                break
            try:
                self._exchange_once(notes)
                self._lost_at = None
            except dist.DistNetworkError:
                if self._lost_at is None:
                    self._lost_at = self._clock.seconds
            except (RuntimeError, ValueError):  # an answer that is late; the other thread knows how late
                pass

    def _tell(self, notes: Notes) -> None:
        own: dict[str, Any] = {"pulse": asdict(self._own)}
        if self._is_main:
            own["verdict"] = None if self._verdict is None else asdict(self._verdict)
        notes.write(self._rank, own)

    def _exchange_once(self, notes: Notes) -> None:
        self._tell(notes)
        if self._is_main:
            self._pulses = {rank: Pulse(**note["pulse"]) for rank, note in notes.read_all().items()}
            return
        note = notes.read(0)
        if note is None:
            return
        self._pulses = {0: Pulse(**note["pulse"])}
        if note["verdict"] is not None:
            silent = tuple(Pulse(**pulse) for pulse in note["verdict"].pop("silent"))
            self._verdict = Verdict(**note["verdict"], silent=silent)

    def _end(self, verdict: Verdict) -> None:
        """Tell, write what this rank was at, let the others do so, and end."""
        heard = self._verdict is not None
        self._verdict = verdict
        self._now.set()
        folder = self._output_dir / FOLDER / verdict.folder
        if not heard:
            _say(
                f"{verdict.sentence}; the run ends, its ranks' stacks and last collectives are in {folder}, "
                "and the same command goes on from the newest checkpoint"
            )
        writing = threading.Thread(target=self._write, args=(folder, verdict), daemon=True)
        writing.start()
        writing.join(_FAREWELL_SECONDS)  # the run's folder may be what hangs
        self._own = replace(self._own, ended=True)
        self._now.set()
        gone = {(pulse.host, pulse.pid) for pulse in verdict.silent}
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._is_main and time.monotonic() < until:  # which has the store
            others = [pulse for rank, pulse in self._pulses.items() if rank != self._rank]
            if all(pulse.ended or (pulse.host, pulse.pid) in gone for pulse in others):
                break
            time.sleep(self._beat_seconds / 4)
            self._now.set()
        if not self._is_main:
            time.sleep(2 * self._beat_seconds)
        for pulse in verdict.silent:
            self._kill(pulse)
        self._leave(1)

    def _kill(self, pulse: Pulse) -> None:
        """End a process of this host that does not run, and holds its device."""
        found = process(pulse.pid) if pulse.host == self._own.host else None
        if found is not None and found.start == pulse.start:
            with suppress(OSError):
                os.kill(pulse.pid, signal.SIGKILL)

    def _write(self, folder: Path, verdict: Verdict) -> None:
        """What this process is at; to stderr if there is no folder of the run yet."""
        try:
            if not self._output_dir.is_dir():
                faulthandler.dump_traceback(all_threads=True)
                return
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
                own = self._own
                file.write(
                    f"{verdict.sentence}\n\nrank {self._rank}, {own}, {own.activity} of step {own.step}\n"
                )
                for pulse in verdict.silent:
                    file.write(describe_silent(pulse, own.host))
                file.write("\nlast collectives begun, the newest last\n")
                file.writelines(f"{line}\n" for line in last_collectives())
                file.write("\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            _say(f"rank {self._rank} cannot write what it was at: {error}")


def position() -> tuple[str, bool]:
    """Where in this package, or in a script, the main thread is; and whether any thread is in a call of
    torch.distributed."""
    main, place, waits = threading.main_thread().ident, "a library", False
    for thread, frame in sys._current_frames().items():
        found = ""
        for inner, line in traceback.walk_stack(frame):
            file = inner.f_code.co_filename
            waits = waits or file.endswith("/torch/distributed/distributed_c10d.py")
            if not found and (file.startswith(_PACKAGE) or not _LIBRARY.search(file)):
                found = f"{Path(file).name}:{line} ({inner.f_code.co_name})"
        if thread == main and found:
            place = found
    return place, waits


def recorded_collectives() -> list[Mapping[str, Any]]:
    """The last collectives that this process began, as torch remembers them, of all process groups."""
    entries: list[Mapping[str, Any]] = []
    for name in _RECORDERS:
        with suppress(AttributeError, RuntimeError, ValueError):
            entries += json.loads(getattr(_distributed_c10d, name)()).get("entries", [])
    return entries


def collectives_begun() -> dict[str, int]:
    """How many collectives this process has begun, by process group."""
    begun: dict[str, int] = {}
    for entry in recorded_collectives():
        if not entry.get("is_p2p"):
            name = " ".join(entry["process_group"])
            begun[name] = max(begun.get(name, 0), entry["collective_seq_id"])
    return begun


def last_collectives() -> list[str]:
    """A line for each of the last ones."""
    entries = recorded_collectives()[-_NAMED_COLLECTIVES:]
    return [
        f"  {' '.join(entry['process_group'])}: {entry['profiling_name']} number "
        f"{entry['collective_seq_id']}, sizes {entry['input_sizes']}, "
        f"{'ended' if entry.get('retired') else entry['state']}"
        for entry in entries
    ] or ["  torch remembers none"]


def describe_silent(pulse: Pulse, host: str) -> str:
    """What the kernel says of a process that is silent, if it is one of this host."""
    found = process(pulse.pid) if pulse.host == host else None
    if found is None or found.start != pulse.start:
        return f"silent: {pulse}, last heard at {pulse.place}\n"
    waiting_in = ""
    with suppress(OSError):
        waiting_in = Path(f"/proc/{pulse.pid}/wchan").read_text(encoding="ascii")
    return f"silent: {pulse}, last heard at {pulse.place}, in state {found.state}, in kernel {waiting_in}\n"


def _folder(main: Pulse) -> str:
    """The same name on every rank, and another for every start of a run."""
    return f"step_{main.step:08d}_of_process_{main.pid}"


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
