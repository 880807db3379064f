"""Which solver the settings of a run name, and what becomes of the keys that this one does not have.

Such a key is a mistake where somebody wrote it for this solver: on the command line, or in the file that
names the kind. One that was inherited, from a base file whose kind a later source changes, is dropped, and
told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.keys import describe_type, did_you_mean, join_or, literal_choices
from megatron_iiet.config.solvers import (
    DEFAULT_SOLVER,
    SOLVERS,
    SolverConfig,
    find_solver,
    name_fields,
    own_keys,
    section_types,
    systems_with,
)

SECTION = "solver."
# What every version of this program wrote into a resolved configuration before kinds had keys of their own.
_EVERY_KIND_HAD = {"kind", "variant", "iterations", "predictor", "coefficient_init", "schedule"}


@dataclass(frozen=True)
class Setting:
    """One value for one key, and the words that tell a user where it came from."""

    key: str
    """Dotted name; known to the schema."""
    value: Any
    """As parsed, before its type is checked."""
    where: str
    """``in run.yaml (line 3)`` or ``on the command line``."""
    source: str = ""
    """The file, or the command line."""


@dataclass(frozen=True)
class SolverSection:
    """A settled section ``solver``."""

    solver: type[SolverConfig]
    settings: list[Setting]
    """Of this solver's keys; those that name it are left out."""
    notes: list[str]
    """What a user must know of it, a sentence each."""


def settle_solver(settings: Sequence[Setting]) -> SolverSection:
    """The solver that ``settings`` (of a whole run, the later of two of a key wins) name, and its keys.

    Raises:
        ConfigError: there is no such solver, or a key was given for it that it does not have.
    """
    ranks = {source: rank for rank, source in enumerate(dict.fromkeys(s.source for s in settings))}
    final = {s.key.removeprefix(SECTION): s for s in settings if s.key.startswith(SECTION)}
    solver = _named(final)
    naming = [ranks[final[name].source] for name in name_fields(solver) if name in final]
    since = max(naming, default=-1)
    keys, own, dropped = own_keys(solver), [], []
    for name, setting in final.items():
        if name in keys:
            own.append(setting)
        elif name not in name_fields(solver):
            if ranks[setting.source] >= since and not _is_resolved(settings, setting.source):
                raise _foreign(name, setting, solver)
            dropped.append(name)
    for setting in own:
        _check_choice(setting, solver)
    if "history_norm" in keys and "history_norm" not in final and "kind" in final:
        source = final["kind"].source
        if _is_resolved(
            settings, source
        ):  # written before there was a choice, when increments were as they are
            own.append(replace(final["kind"], key=f"{SECTION}history_norm", value="none"))
    notes = []
    if dropped:
        listed = ", ".join(SECTION + name for name in section_types() if name in dropped)
        notes.append(f"without effect for {solver().system}: {listed}")
    return SolverSection(solver, own, notes)


def _named(final: Mapping[str, Setting]) -> type[SolverConfig]:
    default = name_fields(DEFAULT_SOLVER)
    kind, variant = final.get("kind"), final.get("variant")
    for name, setting in (("kind", kind), ("variant", variant)):
        if setting is not None and setting.value not in literal_choices(section_types()[name]):
            raise type_error(setting, section_types()[name])
    named = find_solver(kind.value if kind else default["kind"], variant.value if variant else None)
    assert named is not None  # a kind without variants takes any, which is then a key it does not have
    return named


def _is_resolved(settings: Sequence[Setting], source: str) -> bool:
    """Whether a file is a resolved configuration of a version that gave every kind all keys."""
    names = {s.key.removeprefix(SECTION) for s in settings if s.source == source}
    return names >= _EVERY_KIND_HAD


def _foreign(name: str, setting: Setting, solver: type[SolverConfig]) -> ConfigError:
    return ConfigError(
        f"{setting.key} is {setting.value!r} {setting.where}, but the solver is of {solver().system}, which "
        f"has no such key; leave it out, or take a solver of {join_or(systems_with(name))}"
    )


def _check_choice(setting: Setting, solver: type[SolverConfig]) -> None:
    """Refuse a value that another kind's key of this name has, but not this one's."""
    name = setting.key.removeprefix(SECTION)
    choices, value = literal_choices(own_keys(solver)[name]), setting.value
    if not choices or value in choices or value not in literal_choices(section_types()[name]):
        return  # anything else is a matter of types
    having = [
        other().system
        for other in SOLVERS
        if name in own_keys(other) and value in literal_choices(own_keys(other)[name])
    ]
    raise ConfigError(
        f"{setting.key} is '{value}' {setting.where}, which a solver of {solver().system} does not have; set "
        f"it to {join_or([repr(choice) for choice in choices])}, or take a solver of {join_or(having)}"
    )


def type_error(setting: Setting, hint: Any) -> ConfigError:
    """What to say of a value that is none of its type."""
    value = "null" if setting.value is None else repr(setting.value)
    hint_text = did_you_mean(str(setting.value), literal_choices(hint))
    return ConfigError(
        f"{setting.key} is {value} {setting.where}, but must be {describe_type(hint)}{hint_text}"
    )
