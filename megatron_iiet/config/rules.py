"""What a row of the table of illegal combinations (:mod:`megatron_iiet.config.combinations`) is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

    @property
    def pipelined(self) -> bool:
        """Whether DeepSpeed's pipeline engine runs the model."""
        return self.config.parallel.pipeline > 1

    @property
    def bf16(self) -> bool:
        """Whether layers compute in bf16."""
        return self.config.training.precision == "bf16"

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer steps on the CPU."""
        return self.setting("zero_optimization.offload_optimizer.device") == "cpu"

    @property
    def stage(self) -> Any:
        """The ZeRO stage as written; DeepSpeed's default is 0."""
        written = self.setting("zero_optimization.stage")
        return 0 if written is None else written

    def setting(self, key: str) -> Any:
        """The DeepSpeed setting of a dotted name; None if it is absent or "auto"."""
        value: Any = self.ds
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return None if value == AUTO else value


@dataclass(frozen=True)
class Rule:
    """One row: what must not come together, why, and what to do instead."""

    combination: str
    """Markdown for the documentation."""
    why: str
    instead: str
    applies: Callable[[Setup], bool]
    sentence: Callable[[Setup], str]
    """The whole message; for a setup to which the rule applies."""


@dataclass(frozen=True)
class Value:
    """Values of a setting that a rule refuses."""

    description: str
    """Markdown behind the setting's name: ": true", "> 0"."""
    matches: Callable[[Any], bool]


@dataclass(frozen=True)
class With:
    """Under which other circumstances a rule refuses a value."""

    description: str
    """Markdown."""
    holds: Callable[[Setup], bool]
    shown: Callable[[Setup], str]
    """The same with this run's numbers, for the message."""


ALWAYS = With("", lambda setup: True, lambda setup: "")


def refuse(
    keys: str | tuple[str, ...],
    value: Value,
    together: With = ALWAYS,
    *,
    why: str,
    instead: str = "remove it",
) -> Rule:
    """The rule against a value of one DeepSpeed setting, or of any of several."""
    names = (keys,) if isinstance(keys, str) else keys

    def culprit(setup: Setup) -> str | None:
        return next((name for name in names if value.matches(_written(setup, name))), None)

    def sentence(setup: Setup) -> str:
        key = culprit(setup)
        assert key is not None
        written = _written(setup, key)
        shown = "set" if isinstance(written, (dict, list)) else json.dumps(written)
        circumstances = f" with {together.shown(setup)}" if together.description else ""
        return f"{key} is {shown} in {setup.source}{circumstances}, but {why}; {instead}"

    return Rule(
        ", ".join(f"`{name}`" for name in names)
        + (f" {value.description}" if value.description else "")
        + (f" with {together.description}" if together.description else ""),
        why,
        instead,
        lambda setup: together.holds(setup) and culprit(setup) is not None,
        sentence,
    )


def _written(setup: Setup, key: str) -> Any:
    return setup.stage if key == "zero_optimization.stage" else setup.setting(key)
