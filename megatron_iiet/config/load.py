"""Loading a run's configuration: strict YAML and its bases, then command-line overrides, then every check."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_iiet.config import strict_yaml
from megatron_iiet.config.build import build_config
from megatron_iiet.config.changes import ACCEPT_CHANGES
from megatron_iiet.config.errors import ConfigError, ConfigWarning, exit_with_error, is_first_rank
from megatron_iiet.config.help import format_help
from megatron_iiet.config.hugging_face import CONFIG_FILE
from megatron_iiet.config.keys import (
    describe_type,
    did_you_mean,
    key_types,
    literal_choices,
    section_names,
)
from megatron_iiet.config.kind_section import Setting, type_error
from megatron_iiet.config.model_source import FROM, YAML_FILE, resolve_model_source
from megatron_iiet.config.schema import ModelConfig, RunConfig
from megatron_iiet.config.validation import validate

COMMAND_LINE = "on the command line"
SEE_HELP = "; --help lists all keys"
BASE = "base"
"""The key of a file that is no field: the file whose values it starts from."""
# What a start is given besides keys.
_START_FLAGS = {
    "--config": "config",
    "--ds-config": "ds_config",
    "--ds_config": "ds_config",
    "--deepspeed_config": "ds_config",
    f"--{ACCEPT_CHANGES}": "accept_changes",
}
# What launchers add to a script's arguments; the process group is read from the environment instead.
_IGNORED_WITH_VALUE = {"--local_rank", "--local-rank"}
_IGNORED_ALONE = {"--deepspeed"}


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """What a script was started with."""

    config: RunConfig
    """Complete and validated."""
    ds_config_path: Path | None = None
    """The DeepSpeed JSON, if one was given; for :func:`megatron_iiet.config.deepspeed.load_ds_config`."""
    notes: tuple[str, ...] = ()
    """What the user must know of it: sentences for the start of the run."""
    accept_changes: tuple[str, ...] = ()
    """Keys that may differ from the checkpoint's though they would be refused, in this one start."""


def load_config(
    argv: Sequence[str] | None = None, short: Mapping[str, str] = MappingProxyType({})
) -> LoadedConfig:
    """Load a run's configuration from command-line arguments (``sys.argv[1:]`` by default).

    ``short``: a script's own names of flags, e.g. ``{"--teacher": "--distillation.teacher"}``.

    Flags win over the YAML file whatever their order; of two equal flags the later wins. ``--help`` prints
    the help (on the first rank) and exits with status 0.

    Raises:
        ConfigError: unknown key, wrong type, unreadable file, or values that do not fit together.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        if is_first_rank():
            print(format_help(short))
        sys.exit(0)
    files, overrides = _read_arguments(arguments, short)
    settings = (_settings_of_file(files["config"]) if "config" in files else []) + overrides
    config, notes = _build(settings)
    return LoadedConfig(
        config=config,
        ds_config_path=Path(files["ds_config"]) if "ds_config" in files else None,
        notes=tuple(notes),
        accept_changes=_keys_to_accept(files["accept_changes"]) if "accept_changes" in files else (),
    )


def load_config_or_exit(
    argv: Sequence[str] | None = None, short: Mapping[str, str] = MappingProxyType({})
) -> LoadedConfig:
    """:func:`load_config` for scripts: an error becomes one line on stderr and exit status 2; its notes are
    printed."""
    try:
        loaded = load_config(argv, short)
        if is_first_rank():
            for note in loaded.notes:
                print(note, flush=True)
        return loaded
    except ConfigError as error:
        exit_with_error(str(error))


def config_from_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a YAML file; ``overrides`` are words of a command line, e.g. ``["--training.steps", "20"]``. What
    has no effect is a warning.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    files, settings = _read_arguments(overrides)
    if files:
        raise ConfigError("overrides of a configuration file may only set keys of it")
    return _built(_settings_of_file(path) + settings, str(path))


def config_from_dict(data: Mapping[str, Any], source: str = "the given dictionary") -> RunConfig:
    """Build a configuration from nested plain data, e.g. what a checkpoint stored.

    Raises:
        ConfigError: as :func:`load_config`; ``source`` is named in the message.
    """
    return _built(_flatten(data, source, {}), source)


def _built(settings: Sequence[Setting], source: str) -> RunConfig:
    """The configuration; there is no start of a run to tell its notes, so they are warnings."""
    config, notes = _build(settings)
    for note in notes if is_first_rank() else ():
        warnings.warn(f"{source}: {note}", ConfigWarning, stacklevel=3)
    return config


def _build(settings: Sequence[Setting]) -> tuple[RunConfig, list[str]]:
    def model_of_yaml(path: Path) -> ModelConfig:
        return _build(_settings_of_file(path))[0].model

    config, notes = build_config(resolve_model_source(settings, model_of_yaml))
    validate(config)
    return config, notes


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain data (no tuples) that :func:`config_from_dict` and JSON read back unchanged."""
    data = asdict(config)
    if data["solver"].get("schedule") is not None:
        data["solver"]["schedule"] = [list(stage) for stage in data["solver"]["schedule"]]
    return data


def config_to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; :func:`config_from_file` reads it back to an equal object."""
    return strict_yaml.dump(config_to_dict(config))


def _settings_of_file(path: str | Path, built_on_it: tuple[str, ...] = (), named: str = "") -> list[Setting]:
    """The settings of a file, behind those of its base: of two settings of a key the later wins.

    ``built_on_it``: the files whose base this is, directly or not, the outermost first; ``named``: where the
    last of them says so.
    """
    source = str(path)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(f"cannot read the configuration file {source}{named}: {reason}") from None
    data, lines = strict_yaml.parse_document(text, source)
    data = {} if data is None else data
    inherited: list[Setting] = []
    if isinstance(data, Mapping) and BASE in data:
        where = _where(BASE, source, lines)
        inherited = _settings_of_base(data[BASE], where, (*built_on_it, source))
        data = {name: value for name, value in data.items() if name != BASE}
    return inherited + _flatten(data, source, lines)


def _settings_of_base(value: Any, where: str, built_on_it: tuple[str, ...]) -> list[Setting]:
    """The settings of the base that the last of ``built_on_it`` names as ``value``."""
    if not isinstance(value, str) or not value:
        shown = "null" if value is None else repr(value)
        raise ConfigError(
            f"{BASE} is {shown} {where}, but must be the path of a YAML file, or of a model's folder, "
            "relative to this file"
        )
    path = os.path.join(os.path.dirname(built_on_it[-1]), value)
    real_paths = [os.path.realpath(file) for file in (*built_on_it, path)]
    first = real_paths.index(real_paths[-1])
    if first < len(built_on_it):
        circle = [*built_on_it[first:], path]
        raise ConfigError(
            f"{BASE} is '{value}' {where}, which closes a circle, {' -> '.join(circle)}; remove one of them"
        )
    if (Path(path) / YAML_FILE).is_file():
        raise ConfigError(
            f"{BASE} is '{value}' {where}, which is a folder; name its {YAML_FILE}, or write model: "
            f"{{from: {path}}} for the model alone"
        )
    if (Path(path) / CONFIG_FILE).is_file():
        return [Setting(FROM, path, f"{where}, as {BASE}", path)]
    return _settings_of_file(path, built_on_it, f", the {BASE} named {where}")


def _flatten(data: Any, source: str, lines: Mapping[str, int]) -> list[Setting]:
    """Nested data as settings; every key is checked against the schema, none is checked for its type."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} must hold sections with keys, but holds {data!r}")
    settings = []
    for name, value in data.items():
        if "." in str(name):
            raise ConfigError(
                f"unknown key '{name}' {_where(str(name), source, lines)}; write keys inside their section, "
                "not with dots"
            )
        if name not in section_names():
            settings.append(_setting(str(name), value, source, lines))
        elif isinstance(value, Mapping):
            if not all(f"{name}.{leaf}" in key_types() for leaf in value):
                _check_kind(name, value.get("kind"), _where(f"{name}.kind", source, lines))
            settings += [_setting(f"{name}.{leaf}", part, source, lines) for leaf, part in value.items()]
        elif value is not None:  # a section whose lines are all commented out is null
            where = _where(str(name), source, lines)
            raise ConfigError(f"{name} is {value!r} {where}, but is a section and must hold keys")
    return settings


def _setting(key: str, value: Any, source: str, lines: Mapping[str, int]) -> Setting:
    where = _where(key, source, lines)
    if key == ACCEPT_CHANGES:
        raise ConfigError(
            f"{key} stands {where}, but is meant for one start and must not become a habit; give it on the "
            f"command line, --{key} KEY"
        )
    if key not in key_types() and key != FROM:
        candidates = [*key_types(), *section_names()] if "." not in key else list(key_types())
        raise ConfigError(f"unknown key '{key}' {where}{did_you_mean(key, candidates) or SEE_HELP}")
    return Setting(key, value, where, source)


def _check_kind(section: str, kind: Any, where: str) -> None:
    """Refuse a kind that there is not, before a key that no kind has: it may be one of that kind's."""
    hint = key_types().get(f"{section}.kind")
    if hint is not None and kind is not None and kind not in literal_choices(hint):
        raise type_error(Setting(f"{section}.kind", kind, where), hint)


def _where(key: str, source: str, lines: Mapping[str, int]) -> str:
    return f"in {source} (line {lines[key]})" if key in lines else f"in {source}"


def _read_arguments(
    arguments: Sequence[str], short: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, str], list[Setting]]:
    """Split command-line words into file flags and settings; launcher flags are dropped."""
    files: dict[str, str] = {}
    settings: list[Setting] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        flag = short.get(flag, flag)
        if not flag.startswith("--"):
            raise ConfigError(
                f"unexpected word '{word}' {COMMAND_LINE}: write --section.key VALUE, and a list as one word "
                'such as "[0,1,2]"'
            )
        if flag in _IGNORED_ALONE:
            continue
        _check_flag(flag, short, arguments)
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                kind = describe_type(key_types()[flag[2:]]) if flag[2:] in key_types() else "a value"
                raise ConfigError(f"{flag} has no value {COMMAND_LINE}; write {kind} behind it")
        if flag in _START_FLAGS:
            name = _START_FLAGS[flag]
            if files.get(name, value) != value:
                raise ConfigError(
                    f"{flag} names {value} {COMMAND_LINE}, but {files[name]} is given too; keep one"
                )
            files[name] = value
        elif flag not in _IGNORED_WITH_VALUE:
            key = flag[2:]
            parsed = value if key_types().get(key, str) is str else strict_yaml.parse_value(value)
            settings.append(Setting(key, parsed, COMMAND_LINE, COMMAND_LINE))
    return files, settings


def _keys_to_accept(value: str) -> tuple[str, ...]:
    """The keys that the flag :data:`ACCEPT_CHANGES` names: one, or several with commas."""
    keys = tuple(key.strip() for key in value.strip("[] ").split(","))
    for key in keys:
        if key not in key_types():
            raise ConfigError(
                f"--{ACCEPT_CHANGES} names '{key}' {COMMAND_LINE}, which is no key"
                f"{did_you_mean(key, key_types()) or SEE_HELP}"
            )
    return keys


def _check_flag(flag: str, short: Mapping[str, str], arguments: Sequence[str]) -> None:
    if flag in _START_FLAGS or flag in _IGNORED_WITH_VALUE or flag[2:] in (FROM, *key_types()):
        return
    if flag[2:] == BASE:
        raise ConfigError(
            f"{flag} is given {COMMAND_LINE}, but is a key of YAML files only; write '{BASE}: FILE' into "
            "the one that --config names"
        )
    section = flag[2:].partition(".")[0]
    for kind in re.findall(rf"--{re.escape(section)}\.kind[= ](\S+)", " ".join(arguments)):
        _check_kind(section, kind, COMMAND_LINE)
    candidates = [*key_types(), "config", "ds-config", ACCEPT_CHANGES, *(name[2:] for name in short)]
    hint = did_you_mean(flag[2:], candidates, prefix="--") or SEE_HELP
    raise ConfigError(f"unknown key '{flag}' {COMMAND_LINE}{hint}")
