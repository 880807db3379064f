"""From loose settings (key, value, where it came from) to a typed :class:`RunConfig`; and the help text.

jsonargparse knows the types and the help; the messages are written here, because its own name types the
way Python does and cannot say in which file and line a value stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.iteration_plan import SUFFIX, IterationPlan, depth_sentence
from megatron_iiet.config.keys import (
    allows_null,
    describe_type,
    did_you_mean,
    key_types,
    literal_choices,
    section_names,
)
from megatron_iiet.config.schema import RunConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ACCEPT_CHANGES = "checkpoint.accept_changes"
"""The flag, no key of a configuration, with which one start accepts changed keys that would be refused."""
ITERATIONS = "solver.iterations"
"""The key that may name the file of an iteration plan instead of its numbers."""
USAGE = "%(prog)s --config FILE.yaml --ds-config FILE.json [--section.key VALUE ...]"


@dataclass(frozen=True)
class Setting:
    """One value for one key, and the words that tell a user where it came from."""

    key: str
    """Dotted name; known to the schema."""
    value: Any
    """As parsed, before its type is checked."""
    where: str
    """``in run.yaml (line 3)`` or ``on the command line``."""


@cache
def make_parser(short: tuple[tuple[str, str], ...] = ()) -> ArgumentParser:
    """The jsonargparse parser of all keys, with the docstrings of the fields as help; ``short``: a script's
    own flags, and those they stand for."""
    import argparse

    # Imported late: most of the package needs the schema only, not a parser.
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        usage=USAGE,
        description=f"{RunConfig.__doc__} Flags win over the YAML file, wherever they stand.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Run configuration; every key is optional. `base: FILE.yaml` in it names another one, relative "
        "to itself, whose values it starts from.",
    )
    parser.add_argument(
        "--ds-config",
        metavar="FILE.json",
        help="DeepSpeed configuration (also --deepspeed_config); shared values may be left out or 'auto'.",
    )
    for flag, stands_for in short:
        parser.add_argument(
            flag, metavar=stands_for.rsplit(".", 1)[-1].upper(), help=f"Short for {stands_for}."
        )
    parser.add_class_arguments(RunConfig)
    for action in parser._actions:
        if action.dest in section_names():
            action.help = argparse.SUPPRESS  # jsonargparse offers `--model FILE`; one way is enough
        # ... and `--data.split+ VALUE`, which appends to a list.
        action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
    return parser


def format_help(short: Mapping[str, str] = MappingProxyType({})) -> str:
    """The ``--help`` text: every key with explanation, type and default; ``short`` as in
    :func:`make_parser`."""
    parser = make_parser.__wrapped__(tuple(short.items()))  # one of its own: to others it is no key
    parser.add_argument(
        f"--{ACCEPT_CHANGES}",
        metavar="KEY[,KEY...]",
        help="Go on from the checkpoint although these keys have changed, which is refused otherwise "
        "(docs/resume.md). Holds for this start and is recorded; no key of a YAML file.",
    )
    text: str = parser.format_help()
    return text


def build_config(settings: Iterable[Setting]) -> RunConfig:
    """Check the type of every setting and build the configuration; a later setting of a key wins.

    Raises:
        ConfigError: a value has the wrong type or is none of the allowed choices.
    """
    plan, final = _with_plan({setting.key: setting for setting in settings})
    for setting in final:
        if setting.value is None and not allows_null(key_types()[setting.key]):
            raise _type_error(setting)
    try:
        config = _instantiate(final)
    except _parse_errors() as error:
        for setting in final:  # all at once is fast; one by one finds the culprit
            try:
                _instantiate([setting])
            except _parse_errors():
                raise _type_error(setting) from None
        raise ConfigError(f"cannot build the configuration: {' '.join(str(error).split())}") from None
    if plan is not None:
        _check_plan(config, plan)
    return config


def _with_plan(final: dict[str, Setting]) -> tuple[Setting | None, list[Setting]]:
    """The setting that names the file of an iteration plan, if there is one; and all settings, with the list
    in the file as its value."""
    named = final.get(ITERATIONS)
    if named is None or not (isinstance(named.value, str) and named.value.endswith(SUFFIX)):
        return None, list(final.values())
    try:
        iterations = list(IterationPlan.read(named.value).iterations)
    except ValueError as error:
        raise ConfigError(f"{ITERATIONS} {named.where}: {error}") from None
    return named, list({**final, ITERATIONS: replace(named, value=iterations)}.values())


def _check_plan(config: RunConfig, named: Setting) -> None:
    """Refuse a plan that the other settings leave no room for; ``named`` is the setting that names it."""
    iterations, layers, kind = config.solver.iterations, config.model.num_layers, config.solver.kind
    assert isinstance(iterations, list)
    if len(iterations) != layers:
        raise ConfigError(
            f"{ITERATIONS} {named.where}: {depth_sentence(named.value, len(iterations), layers)}"
        )
    if kind != "iiet" and any(iterations):
        raise ConfigError(
            f"{ITERATIONS} {named.where}: {named.value} is an iteration plan with up to {max(iterations)} "
            f"iterations a layer, but solver.kind is '{kind}', which has none; set solver.kind to 'iiet', or "
            f"{ITERATIONS} to 0"
        )


def _parse_errors() -> tuple[type[Exception], ...]:
    from argparse import ArgumentError

    return (ArgumentError, TypeError, ValueError)


def _instantiate(settings: Sequence[Setting]) -> RunConfig:
    nested: dict[str, Any] = {}
    for setting in settings:
        *section, leaf = setting.key.split(".")
        target = nested.setdefault(section[0], {}) if section else nested
        target[leaf] = setting.value
    parser = make_parser()
    built = parser.instantiate(parser.parse_object(nested))
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: built[name] for name in names})


def _type_error(setting: Setting) -> ConfigError:
    hint = key_types()[setting.key]
    value = "null" if setting.value is None else repr(setting.value)
    hint_text = did_you_mean(str(setting.value), literal_choices(hint))
    return ConfigError(
        f"{setting.key} is {value} {setting.where}, but must be {describe_type(hint)}{hint_text}"
    )
