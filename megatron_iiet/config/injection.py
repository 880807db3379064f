"""Faults that a run brings upon itself, to see that it survives them: what ``debug.inject`` lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_iiet.config.errors import ConfigError

KINDS = {
    "kill": ("step", "rank"),
    "stop": ("step", "rank"),
    "raise": ("step", "rank"),
    "nan": ("step", "rank"),
    "drift": ("step", "rank"),
    "enospc": ("step", "rank"),
    "slow_disk": ("step", "rank", "seconds"),
    "flip": ("step", "rank"),
}
"""Kinds, and what each may say of its place."""
_FORM = "KIND@step=N,rank=R"


@dataclass(frozen=True)
class Injection:
    """One fault."""

    kind: str
    step: int | None = None
    """Before which step (kill, stop, raise, nan, drift), or at whose checkpoint; None: at every one."""
    rank: int = 0
    seconds: float = 0.0
    """How much longer a write takes."""

    @classmethod
    def read(cls, text: str) -> Injection:
        """One as ``debug.inject`` writes it.

        Raises:
            ConfigError: it is none.
        """
        kind, _, place = text.partition("@")
        if kind not in KINDS:
            raise ConfigError(
                f"debug.inject has {text!r}, whose kind is none of {', '.join(KINDS)}; write {_FORM}"
            )
        values: dict[str, float] = {}
        for part in filter(None, place.split(",")):
            name, _, value = part.partition("=")
            if name not in KINDS[kind] or not re.fullmatch(r"\d+(\.\d+)?", value):
                raise ConfigError(
                    f"debug.inject has {text!r}, where {part!r} is not one of "
                    f"{', '.join(f'{known}=NUMBER' for known in KINDS[kind])}; write {_FORM}"
                )
            values[name] = float(value)
        if "step" not in values and kind != "slow_disk":
            raise ConfigError(f"debug.inject has {text!r}, which names no step; write {_FORM}")
        step = int(values["step"]) if "step" in values else None
        return cls(kind, step, int(values.get("rank", 0)), values.get("seconds", 1.0))
