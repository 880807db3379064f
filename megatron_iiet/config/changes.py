"""What a change of a key means to a run that has checkpoints, declared on the field itself by :func:`key`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, field
from enum import Enum
from typing import Any

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


def key(default: Any = MISSING, change: Change | None = None, *, factory: Callable[[], Any] = list) -> Any:
    """A field of a section, with what a change of it means; ``factory`` makes the default if none is given.

    Raises:
        TypeError: no class of change is given.
    """
    if change is None:
        raise TypeError("a key needs a class of change; see megatron_iiet.config.changes.Change")
    metadata = {_METADATA: change}
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
