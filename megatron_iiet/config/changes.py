"""What is declared of a key on the field itself, by :func:`key`, beside its type, default and help: which
numbers it may have, and what a change of it means to a run that has checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field
from enum import Enum
from typing import Any

ACCEPT_CHANGES = "checkpoint.accept_changes"
"""The flag, no key of a configuration, with which one start accepts changed keys that would be refused."""
_METADATA = "change"


class Change(Enum):
    """What a key decides; its value says what happens where a run is resumed with another value."""

    FUNCTION = "refused: the parameters there would compute something else"
    ORDER = "refused: samples would come in another order, some twice and some never"
    COURSE = "allowed, told and recorded: from here on training takes another course"
    FREE = "allowed in silence: it changes nothing that is trained"

    @property
    def refused(self) -> bool:
        """Whether a run is not resumed with another value, unless the start accepts it by name."""
        return self in (Change.FUNCTION, Change.ORDER)


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


def key(
    default: Any = MISSING,
    change: Change | None = None,
    *ranges: Range,
    factory: Callable[[], Any] = list,
    exported: bool = True,
) -> Any:
    """A field of a section.

    Args:
        change: what a change of it means.
        ranges: that a number must lie in.
        factory: makes the default if none is given.
        exported: of a solver's key, whether it says something of a trained model, not of its training.

    Raises:
        TypeError: no class of change is given.
    """
    if change is None:
        raise TypeError("a key needs a class of change; see megatron_iiet.config.changes.Change")
    metadata = {_METADATA: change, "ranges": ranges, "exported": exported}
    if default is MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def change_of_field(declared: Field[Any]) -> Change:
    """The class that :func:`key` gave a field.

    Raises:
        TypeError: it was declared without.
    """
    if _METADATA not in declared.metadata:
        raise TypeError(f"the key {declared.name} has no class of change; declare it with key()")
    return Change(declared.metadata[_METADATA])
