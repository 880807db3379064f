"""Which numbers a key may have, and how a message says so."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval of numbers."""

    must: str
    """What a number must do: the end of "…, but must …"."""
    least: float = -math.inf
    most: float = math.inf
    least_included: bool = True
    most_included: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.least if self.least_included else value > self.least
        below = value <= self.most if self.most_included else value < self.most
        return above and below


POSITIVE = Range("be greater than 0", least=0, least_included=False)
NOT_NEGATIVE = Range("be 0 or greater", least=0)
FRACTION = Range("lie between 0 and 1", least=0, most=1)
BELOW_ONE = Range("be at least 0 and less than 1", least=0, most=1, most_included=False)
