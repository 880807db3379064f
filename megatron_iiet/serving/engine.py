"""Who runs: a thread with one batch, and those who wait for a place in it."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence

from megatron_iiet.serving.batch import Batch, next_group
from megatron_iiet.serving.continuation import Continuation

STOPPED = "the server stops"
"""The error of sequences that were not finished then."""


class BusyError(Exception):
    """As many wait as may; or the engine has stopped."""


class Engine:
    """Runs sequences in the order in which they come. Methods may be called from any thread."""

    def __init__(self, batch: Batch, *, max_waiting: int) -> None:
        """``max_waiting``: most sequences without a place."""
        self.batch = batch
        self.max_waiting = max_waiting
        self._waiting: list[Continuation] = []
        self._joining: list[Continuation] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to run what is submitted."""
        self._thread.start()

    def stop(self) -> None:
        """End after the token in progress; what is not finished fails."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether what is submitted will run."""
        return self._thread.is_alive() and not self._stopped

    @property
    def load(self) -> tuple[int, int]:
        """How many run, how many wait."""
        return len(self.batch.running) + len(self._joining), len(self._waiting)

    def submit(self, continuations: Sequence[Continuation]) -> None:
        """Let all of them wait for places.

        Raises:
            BusyError: more would wait than may; none of them does.
        """
        with self._changed:
            free = self.batch.places + self.max_waiting - sum(self.load)
            if not self.alive or len(continuations) > free:
                raise BusyError
            self._waiting += continuations
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self.batch.running or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    break
                self._waiting = [each for each in self._waiting if not each.cancelled]
                free = self.batch.places - len(self.batch.running)
                count = next_group(self._waiting, free)
                group = self._joining = self._waiting[:count]
                self._waiting = self._waiting[count:]
            try:
                self._turn(group)
            except Exception as error:  # of this batch; the next one may do
                lost = [*group, *self.batch.running]
                self.batch.reset()
                self._fail(lost, error)
        for each in (*self.batch.running, *self._waiting):
            each.fail(STOPPED)

    def _turn(self, group: Sequence[Continuation]) -> None:
        for each in list(self.batch.running):
            if each.cancelled:
                self.batch.leave(each)
        if group:
            try:
                read = self.batch.read(group)
            except Exception as error:  # too little memory for these prompts, perhaps
                self._joining = []
                self._fail(group, error)
            else:
                self._joining = []
                self.batch.join(group, *read)
        if self.batch.running:
            self.batch.step()

    def _fail(self, continuations: Sequence[Continuation], error: Exception) -> None:
        traceback.print_exception(error, file=sys.stderr)
        for each in continuations:
            each.fail(f"the model failed ({type(error).__name__}); the server's own output has more")
