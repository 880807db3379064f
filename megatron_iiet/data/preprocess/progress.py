"""How far the work is: a bar on a terminal, else a plain line now and then for log files."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts units and what is in them; use it as a context manager."""

    def __init__(self, title: str, what: str, units: int, enabled: bool) -> None:
        self._title, self._what, self._units = title, what, units
        self._enabled = enabled
        self._done = self._count = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm  # 40 ms that a batch job need not pay

            self._bar = tqdm(desc=title, unit=f" {what}", unit_scale=True)

    def add(self, count: int) -> None:
        """Count tokens or rows."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def unit_done(self) -> None:
        """Count a finished unit."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._done}/{self._units} shards")

    def __str__(self) -> str:
        rate = self._count / max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self._title}: {self._done} of {self._units} shards, {self._count:,} {self._what}, "
            f"{rate:,.0f} {self._what}/s"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
