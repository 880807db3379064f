"""What a row of the table of illegal combinations (:mod:`megatron_iiet.config.combinations`) is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_iiet.config.keys import join_words
from megatron_iiet.config.schema import RunConfig

AUTO = "auto"


@dataclass(frozen=True)
class Setup:
    """What somebody wants to start."""

    config: RunConfig
    ds: Mapping[str, Any]
    """The DeepSpeed JSON as it was read."""
    world_size: int
    """Number of processes."""
    source: str
    """How messages name the DeepSpeed JSON."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model; meaningful once the number of processes is known to divide."""
        return self.world_size // (self.config.parallel.tensor * self.config.parallel.pipeline)

    def setting(self, key: str) -> Any:
        """The DeepSpeed setting of a dotted name; None if it is absent or "auto". The ZeRO stage is then 0,
        DeepSpeed's default."""
        value: Any = self.ds
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        value = None if value == AUTO else value
        return 0 if key == STAGE and value is None else value


STAGE = "zero_optimization.stage"


@dataclass(frozen=True)
class Rule:
    """One row: what must not come together, why, and what to do instead, as the documentation has it."""

    combination: str
    why: str
    instead: str
    problem: Callable[[Setup], str | None]
    """The whole message for a setup to which the rule applies."""


@dataclass(frozen=True)
class Value:
    """Values of a setting that a rule refuses."""

    description: str
    """Markdown behind the setting's name: ": true", "> 0"."""
    matches: Callable[[Any], bool]


@dataclass(frozen=True)
class With:
    """Under which other circumstance a rule refuses a value."""

    description: str
    """Markdown."""
    holds: Callable[[Setup], bool]
    shown: str
    """The same with this run's numbers, for the message: a format of ``config`` and ``stage``, or empty."""


def refuse(
    keys: str | tuple[str, ...], value: Value, *together: With, why: str, instead: str = "remove it"
) -> Rule:
    """The rule against a value of one DeepSpeed setting, or of any of several, where ``together`` holds."""
    names = (keys,) if isinstance(keys, str) else keys

    def problem(setup: Setup) -> str | None:
        written = {name: setup.setting(name) for name in names}
        key = next((name for name in names if value.matches(written[name])), None)
        if key is None or not all(circumstance.holds(setup) for circumstance in together):
            return None
        what = "set" if isinstance(written[key], (dict, list)) else json.dumps(written[key])
        shown = [c.shown.format(config=setup.config, stage=setup.setting(STAGE)) for c in together if c.shown]
        circumstances = f" with {join_words(shown, 'and')}" if shown else ""
        return f"{key} is {what} in {setup.source}{circumstances}, but {why}; {instead}"

    combination = ", ".join(f"`{name}`" for name in names)
    combination += f" {value.description}" if value.description else ""
    combination += f" with {join_words([c.description for c in together], 'and')}" if together else ""
    return Rule(combination, why, instead, problem)
