"""How long a run may take for what it does: the object ``parallel.timeouts``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_iiet.config.errors import ConfigError

KEY = "parallel.timeouts"


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a run that gets no further is ended."""

    start: float = 1800.0
    """For the start, and for what is neither a step nor a save: validation, tasks, diagnostics."""
    step: float | None = None
    """For a step; None: learned from those before."""
    save: float = 1800.0
    """For a checkpoint."""

    @property
    def longest(self) -> float:
        """What a collective may wait: any rank may be at any of these."""
        return max(self.start, self.save, self.step or 0.0)


def read_timeouts(value: Mapping[str, Any]) -> Timeouts:
    """The bounds that an object gives; the others are the default's.

    Raises:
        ConfigError: one is unknown, or is no number of seconds.
    """
    known = [field.name for field in fields(Timeouts)]
    for name, seconds in value.items():
        if name not in known:
            raise ConfigError(f"{KEY} has the key {name!r}, but its keys are {', '.join(known)}")
        if isinstance(seconds, bool) or not 0 < seconds < math.inf:
            raise ConfigError(f"{KEY}.{name} is {seconds!r}, but must be seconds, more than 0")
    return Timeouts(**value)
