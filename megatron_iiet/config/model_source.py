"""``model.from``: the model section of another model instead of one typed by hand. It is resolved while a
configuration is loaded and is no key of one: what is recorded are the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_iiet.config.changes import Change, change_of_field
from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.hugging_face import CONFIG_FILE, model_of_fields, read_json
from megatron_iiet.config.kind_section import Setting
from megatron_iiet.config.schema import ModelConfig

FROM = "model.from"
YAML_FILE = "config.yaml"

# What says nothing of the function: these may be given beside it.
_FREE = {"vocab_multiple"} | {
    declared.name for declared in fields(ModelConfig) if change_of_field(declared) is not Change.FUNCTION
}


def resolve_model_source(
    settings: Sequence[Setting], read_yaml: Callable[[Path], ModelConfig]
) -> list[Setting]:
    """The settings with those of the model that the last ``model.from`` names in its place: over what earlier
    files say, under what stands beside it or behind it, which may not contradict it.

    ``read_yaml``: the model section of one of our own files.

    Raises:
        ConfigError: there is no such model, it is none of ours, or another setting contradicts it.
    """
    others = [setting for setting in settings if setting.key != FROM]
    named = next((setting for setting in reversed(settings) if setting.key == FROM), None)
    if named is None or named.value is None:
        return others
    if not isinstance(named.value, str) or not named.value:
        raise ConfigError(f"{FROM} is {named.value!r} {named.where}, but must be the folder of a model")
    try:
        model, known = _read(Path(named.value), read_yaml)
    except ValueError as error:
        raise ConfigError(f"{FROM} is {named.value} {named.where}: {error}") from None
    behind = list(settings)[list(settings).index(named) :]
    beside = [setting for setting in others if setting.source == named.source or setting in behind]
    for setting in beside:
        _check(setting, model, named)
    where = f"in {named.value}, which {FROM} names {named.where}"
    taken = [Setting(f"model.{name}", value, where, named.source) for name, value in known.items()]
    return [*(setting for setting in others if setting not in beside), *taken, *beside]


def _read(folder: Path, read_yaml: Callable[[Path], ModelConfig]) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in a folder, and the keys of the section that it decides."""
    ours, theirs = folder / YAML_FILE, folder / CONFIG_FILE
    said: dict[str, Any] = {}
    if ours.is_file():
        model = read_yaml(ours)
    elif theirs.is_file():
        said = read_json(theirs)
        model = model_of_fields(said, theirs)
    else:
        what = f"it has no {CONFIG_FILE} or {YAML_FILE}" if folder.is_dir() else "it is no folder"
        raise ValueError(
            f"{what}; give the folder of a model that tools/convert_checkpoint.py reads, or a run's"
        )
    known = {f.name: getattr(model, f.name) for f in fields(model)}
    known["embedding_scale"] = model.resolved_embedding_scale  # whatever model.init_std will be
    if said and "vocab_multiple" not in said:
        del known["vocab_multiple"]
    return model, known


def _check(setting: Setting, model: ModelConfig, named: Setting) -> None:
    name = setting.key.removeprefix("model.")
    if name == setting.key or name in _FREE:
        return
    try:
        wanted = replace(model, **{name: setting.value}).resolved()[name]
    except (TypeError, ValueError, ArithmeticError):
        return  # a value of a wrong type, which the types' own check names
    if wanted != model.resolved()[name]:
        there = f"{model.resolved()[name]!r} in {named.value}, which {FROM} names {named.where}"
        raise ConfigError(
            f"{setting.key} is {setting.value!r} {setting.where}, but {there}; leave one of them out"
        )
