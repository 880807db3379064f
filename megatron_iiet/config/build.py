"""From loose settings (key, value, where it came from) to a typed :class:`RunConfig`. jsonargparse knows the
types; its own messages cannot say in which file and line a value stood."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.iteration_plan import SUFFIX, IterationPlan, depth_sentence
from megatron_iiet.config.keys import allows_null, key_types
from megatron_iiet.config.kind_section import Setting, settle, type_error
from megatron_iiet.config.kinds import Declaration, own_keys
from megatron_iiet.config.schema import KINDS, RunConfig, iterations_per_layer

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_PARSE_ERRORS = (ArgumentError, TypeError, ValueError)
ITERATIONS = "solver.iterations"
"""The key that may name the file of an iteration plan instead of its numbers."""


def build_config(settings: Sequence[Setting]) -> tuple[RunConfig, list[str]]:
    """Check the type of every setting and build the configuration; a later setting of a key wins.

    Returns:
        the configuration, and what its user must know of it: sentences.

    Raises:
        ConfigError: a value has the wrong type or is none of the allowed choices, or a key was given for a
            solver that does not have it.
    """
    sections: dict[str, Declaration] = {}
    notes, plan = [], None
    for name, kinds in KINDS.items():
        declared, own, dropped = settle(kinds, settings)
        named, own = _with_plan(own)
        plan = named or plan
        types = {f"{name}.{leaf}": hint for leaf, hint in own_keys(declared).items()}
        sections[name] = _build(own, types, partial(_section_of, declared))
        notes += dropped
    others = list({s.key: s for s in settings if s.key.split(".")[0] not in KINDS}.values())
    config = _build(others, key_types(), partial(_run_of, sections))
    iterations, layers = iterations_per_layer(config), config.model.num_layers
    if plan is not None and len(iterations) != layers:
        raise ConfigError(f"{ITERATIONS} {plan.where}: {depth_sentence(plan.value, len(iterations), layers)}")
    return config, notes


def _build(
    settings: Sequence[Setting], types: Mapping[str, Any], make: Callable[[Sequence[Setting]], Any]
) -> Any:
    """What ``make`` makes of all settings; an error is laid at the setting that causes it."""
    for setting in settings:
        if setting.value is None and not allows_null(types[setting.key]):
            raise type_error(setting, types[setting.key])
    try:
        return make(settings)
    except _PARSE_ERRORS as error:
        for setting in settings:  # all at once is fast; one by one finds the culprit
            try:
                make([setting])
            except _PARSE_ERRORS:
                raise type_error(setting, types[setting.key]) from None
        raise ConfigError(f"cannot build the configuration: {' '.join(str(error).split())}") from None


def _section_of(declared: type[Declaration], settings: Sequence[Setting]) -> Declaration:
    built = _parsers()[declared].parse_object({s.key.split(".")[1]: s.value for s in settings})
    return declared(**{name: built[name] for name in own_keys(declared)})


def _run_of(sections: Mapping[str, Declaration], settings: Sequence[Setting]) -> RunConfig:
    nested: dict[str, Any] = {}
    for setting in settings:
        *section, leaf = setting.key.split(".")
        target = nested.setdefault(section[0], {}) if section else nested
        target[leaf] = setting.value
    parser = _parsers()[RunConfig]
    built = parser.instantiate(parser.parse_object(nested))
    names = [name for name in RunConfig.__dataclass_fields__ if name not in sections]
    return RunConfig(**{name: built[name] for name in names}, **cast(dict[str, Any], sections))


def _with_plan(settings: list[Setting]) -> tuple[Setting | None, list[Setting]]:
    """The setting that names the file of an iteration plan, if there is one; and all settings, with the list
    in the file as its value."""
    named = next((s for s in settings if s.key == ITERATIONS), None)
    if named is None or not (isinstance(named.value, str) and named.value.endswith(SUFFIX)):
        return None, settings
    try:
        iterations = list(IterationPlan.read(named.value).iterations)
    except ValueError as error:
        raise ConfigError(f"{ITERATIONS} {named.where}: {error}") from None
    return named, [replace(s, value=iterations) if s is named else s for s in settings]


@cache
def _parsers() -> dict[type, ArgumentParser]:
    """The types of all keys of a run but those that depend on a kind, and of each declaration's."""
    from jsonargparse import ArgumentParser

    classes: tuple[type, ...] = (RunConfig, *(declared for kinds in KINDS.values() for declared in kinds))
    parsers = {cls: ArgumentParser(exit_on_error=False, default_env=False) for cls in classes}
    for cls, parser in parsers.items():
        parser.add_class_arguments(cls, skip=set(KINDS) if cls is RunConfig else set())
    return parsers
