"""From loose settings (key, value, where it came from) to a typed :class:`RunConfig`. jsonargparse knows the
types; its own messages cannot say in which file and line a value stood."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.iteration_plan import SUFFIX, IterationPlan, depth_sentence
from megatron_iiet.config.keys import allows_null, key_types, section_types
from megatron_iiet.config.kind_section import Setting, settle, type_error
from megatron_iiet.config.kinds import own_keys
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
    parts: dict[str, Any] = {}
    notes, plan = [], None
    for name, kinds in KINDS.items():
        declared, own, dropped = settle(kinds, settings)
        named, own = _with_plan(own)
        plan = named or plan
        types = {f"{name}.{leaf}": hint for leaf, hint in own_keys(declared).items()}
        parts[name] = declared(**_build(declared, own, types))
        notes += dropped
    for name, cls in section_types().items():
        of_section = {s.key: s for s in settings if s.key.startswith(f"{name}.")}
        if name not in KINDS and of_section:
            parts[name] = cls(**_build(cls, list(of_section.values()), key_types()))
    own_keys_of_run = {s.key: s for s in settings if "." not in s.key}
    parts |= _build(RunConfig, list(own_keys_of_run.values()), key_types())
    config = RunConfig(**parts)
    iterations, layers = iterations_per_layer(config), config.model.num_layers
    if plan is not None and len(iterations) != layers:
        raise ConfigError(f"{ITERATIONS} {plan.where}: {depth_sentence(plan.value, len(iterations), layers)}")
    return config, notes


def _build(cls: type, settings: Sequence[Setting], types: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the fields of ``cls`` that are set; an error is laid at the setting that causes it."""
    for setting in settings:
        if setting.value is None and not allows_null(types[setting.key]):
            raise type_error(setting, types[setting.key])
    try:
        return _parsed(cls, settings)
    except _PARSE_ERRORS as error:
        for setting in settings:  # all at once is fast; one by one finds the culprit
            try:
                _parsed(cls, [setting])
            except _PARSE_ERRORS:
                raise type_error(setting, types[setting.key]) from None
        raise ConfigError(f"cannot build the configuration: {' '.join(str(error).split())}") from None


def _parsed(cls: type, settings: Sequence[Setting]) -> dict[str, Any]:
    values = {setting.key.rpartition(".")[2]: setting.value for setting in settings}
    built = _parser(cls).parse_object(values, defaults=False) if values else {}
    return {name: built[name] for name in values}


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
def _parser(cls: type) -> ArgumentParser:
    """The types of the fields of ``cls`` that are no sections. A parser of all keys would look through all
    of them for each."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(cls, skip=set(section_types()) if cls is RunConfig else set())
    return parser
