"""Which kind the settings of a run name in a section of :class:`Kinds`. A key that it does not have is a
mistake if somebody wrote it for this kind; one inherited from a base of another kind is dropped, and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.keys import describe_type, did_you_mean, join_words, literal_choices
from megatron_iiet.config.kinds import D, Declaration, Kinds, name_fields, own_keys


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


def settle(kinds: Kinds[D], settings: Sequence[Setting]) -> tuple[type[D], list[Setting], list[str]]:
    """The kind that ``settings`` (of a whole run, the later of two of a key wins) name, the settings of its
    keys but for those that name it, and what a user must know of them, a sentence each.

    Raises:
        ConfigError: there is no such kind, or a key was given for it that it does not have.
    """
    prefix = f"{kinds.section}."
    ranks = {source: rank for rank, source in enumerate(dict.fromkeys(s.source for s in settings))}
    final = {s.key.removeprefix(prefix): s for s in settings if s.key.startswith(prefix)}
    declared = _named(kinds, final)
    since = max((ranks[final[name].source] for name in name_fields(declared) if name in final), default=-1)
    keys, own, dropped = own_keys(declared), [], []
    for name, setting in final.items():
        if name in keys:
            own.append(setting)
        elif name not in name_fields(declared):
            if ranks[setting.source] >= since and not _is_flat(kinds, settings, setting.source):
                raise ConfigError(
                    f"{setting.key} is {setting.value!r} {setting.where}, but the {kinds.section} is of "
                    f"{declared().system}, which has no such key; leave it out, or take {kinds.noun} of "
                    f"{join_words(kinds.systems_with(name))}"
                )
            dropped.append(name)
    for setting in own:
        _check_choice(kinds, setting.key.removeprefix(prefix), setting, declared)
    if "kind" in final and _is_flat(kinds, settings, final["kind"].source):
        missing = [name for name in kinds.before if name in keys and name not in final]
        own += [replace(final["kind"], key=prefix + name, value=kinds.before[name]) for name in missing]
    listed = ", ".join(prefix + name for name in kinds.types if name in dropped)
    return declared, own, [f"without effect for {declared().system}: {listed}"] if dropped else []


def _named(kinds: Kinds[D], final: Mapping[str, Setting]) -> type[D]:
    kind, variant = final.get("kind"), final.get("variant")
    for name, setting in (("kind", kind), ("variant", variant)):
        if setting is not None and setting.value not in literal_choices(kinds.types[name]):
            raise type_error(setting, kinds.types[name])
    default = name_fields(kinds.default)["kind"]
    named = kinds.find(kind.value if kind else default, variant.value if variant else None)
    assert named is not None  # a kind without variants takes any, which is then a key it does not have
    return named


def _is_flat(kinds: Kinds[D], settings: Sequence[Setting], source: str) -> bool:
    """Whether a file was written by a version that gave every kind all keys."""
    names = {s.key.removeprefix(f"{kinds.section}.") for s in settings if s.source == source}
    return bool(kinds.flat) and names >= kinds.flat


def _check_choice(kinds: Kinds[D], name: str, setting: Setting, declared: type[Declaration]) -> None:
    """Refuse a value that another kind's key of this name has, but not this one's."""
    choices, value = literal_choices(own_keys(declared)[name]), setting.value
    if not choices or value in choices or value not in literal_choices(kinds.types[name]):
        return  # anything else is a matter of types
    having = [
        other().system
        for other in kinds
        if name in own_keys(other) and value in literal_choices(own_keys(other)[name])
    ]
    raise ConfigError(
        f"{setting.key} is '{value}' {setting.where}, which {kinds.noun} of {declared().system} does not "
        f"have; set it to {join_words([repr(choice) for choice in choices])}, or take {kinds.noun} of "
        f"{join_words(having)}"
    )


def type_error(setting: Setting, hint: Any) -> ConfigError:
    """What to say of a value that is none of its type."""
    value = "null" if setting.value is None else repr(setting.value)
    hint_text = did_you_mean(str(setting.value), literal_choices(hint))
    return ConfigError(
        f"{setting.key} is {value} {setting.where}, but must be {describe_type(hint)}{hint_text}"
    )
