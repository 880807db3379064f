"""How far a run has come, for whoever watches over it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from megatron_iiet.config.timeouts import Timeouts

AT_LEAST_SECONDS = 120.0
"""Of the bound of a step that is learned: what a file system or a network may take to come back."""
_TIMES = 10.0
"""That bound, in longest steps."""
_REMEMBERED = 64


class Activity(StrEnum):
    """What a run is at; each has a bound of its own."""

    START = "start"
    """All until the first step is done: kernels are compiled in it."""
    STEP = "step"
    BETWEEN = "between"
    """Validation, tasks, diagnostics."""
    SAVE = "save"


class Progress:
    """What the main thread is at; other threads read it."""

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        data_timeout: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``data_timeout``: what a step may wait for its data, in seconds."""
        self._timeouts, self._data_timeout, self._clock = timeouts or Timeouts(), data_timeout, clock
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._since = clock()
        self.now = (Activity.START, 0, 0)
        """Activity, step, and how many activities there were."""

    def begin(self, activity: Activity, step: int) -> None:
        """From now on the run is at this."""
        before, _, count = self.now
        now = self._clock()
        if before is Activity.STEP:
            self._durations.append(now - self._since)
        self._since, self.now = now, (activity, step, count + 1)

    @contextmanager
    def at(self, activity: Activity) -> Iterator[None]:
        """Inside the block at this; afterwards at what was before."""
        before, step, _ = self.now
        self.begin(activity, step)
        try:
            yield
        finally:
            self.begin(before, step)

    @property
    def silence(self) -> float:
        """Seconds that a process may give no sign of life, once it trains."""
        if self._timeouts.step is not None:
            return self._timeouts.step
        return max(AT_LEAST_SECONDS, _TIMES * max(self._durations, default=0.0))

    def bound(self, activity: Activity) -> float:
        """Seconds that an activity may take."""
        if activity is not Activity.STEP:
            return self._timeouts.save if activity is Activity.SAVE else self._timeouts.start
        given = self._timeouts.step is not None
        return self.silence if given else max(self.silence, 1.2 * self._data_timeout)

    def why(self, activity: Activity) -> str:
        """Where an activity's bound comes from, in a few words."""
        if activity is Activity.STEP and self._timeouts.step is None:
            longest = max(self._durations, default=0.0)
            return f"learned from steps of up to {longest:.3g} s; parallel.timeouts.step sets another"
        return f"parallel.timeouts.{'start' if activity is Activity.BETWEEN else activity}"
