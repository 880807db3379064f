"""The ``--help`` text: every key with its explanation, type and default; those of a kind by kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megatron_iiet.config.changes import ACCEPT_CHANGES
from megatron_iiet.config.keys import section_names
from megatron_iiet.config.kinds import Declaration, Kinds, name_fields, own_keys
from megatron_iiet.config.model_source import FROM
from megatron_iiet.config.schema import KINDS, RunConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def format_help(short: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text, made by jsonargparse with the docstrings of the fields as help; ``short``: a script's own
    flags, and those they stand for."""
    import argparse

    # Imported late: most of the package needs the schema only, not a parser.
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        usage="%(prog)s --config FILE.yaml --ds-config FILE.json [--section.key VALUE ...]",
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
    parser.add_argument(
        f"--{FROM}",
        metavar="FOLDER",
        help="A model whose shape the model section takes, also as a key of the YAML file: a Hugging Face "
        "folder, a model folder or a run. What is given beside it must not contradict it.",
    )
    for flag, stands_for in short.items():
        parser.add_argument(
            flag, metavar=stands_for.rsplit(".", 1)[-1].upper(), help=f"Short for {stands_for}."
        )
    parser.add_class_arguments(RunConfig, skip=set(KINDS))
    for kinds in KINDS.values():
        _add_kinds(parser, kinds)
    for action in parser._actions:
        # jsonargparse offers `--model FILE`, and `--data.split+ VALUE` to append; one way is enough
        if action.dest in section_names():
            action.help = argparse.SUPPRESS
        action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
    parser.add_argument(
        f"--{ACCEPT_CHANGES}",
        metavar="KEY[,KEY...]",
        help="Go on from the checkpoint although these keys have changed, which is refused otherwise "
        "(docs/resume.md). Holds for this start and is recorded; no key of a YAML file.",
    )
    return str(parser.format_help())


def _add_kinds(parser: ArgumentParser, kinds: Kinds[Any]) -> None:
    """A group of keys for each kind of a section; a key of several stands with the first of them."""
    section, types, defaults = kinds.section, kinds.types, name_fields(kinds.default)
    naming = parser.add_argument_group(attribute_docs(RunConfig)[section].rstrip("."))
    summaries = {declared().system: _summary(declared) for declared in kinds}
    listed = "; ".join(f"{system.removeprefix('kind ')}: {summary}" for system, summary in summaries.items())
    texts = {"kind": f"{listed}.", "variant": "Which reading of the kind, where it has several."}
    for name in (name for name in texts if name in types):
        naming.add_argument(f"--{section}.{name}", type=types[name], default=defaults[name], help=texts[name])
    shown: dict[str, str] = {}
    for declared in kinds:
        system, keys, texts = declared().system, own_keys(declared), attribute_docs(declared)
        elsewhere = [f"--{section}.{name} (see {shown[name]})" for name in keys if name in shown]
        group = parser.add_argument_group(
            f"{section.capitalize()} of {system}",
            f"{_summary(declared)}. Also: {', '.join(elsewhere)}" if elsewhere else _summary(declared),
        )
        for name, default in ((f.name, f.default) for f in fields(declared) if f.name in keys):
            if name not in shown:
                group.add_argument(f"--{section}.{name}", type=types[name], default=default, help=texts[name])
                shown[name] = system


def _summary(declared: type[Declaration]) -> str:
    """A declaration's docstring, a sentence without its stop."""
    return " ".join((declared.__doc__ or "").split()).rstrip(".")


def attribute_docs(declared: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, also of an inherited one."""
    from docstring_parser import parse_from_object

    found: dict[str, str] = {}
    for cls in reversed(inspect.getmro(declared)[:-1]):
        parsed = parse_from_object(cls)
        found |= {
            part.arg_name: " ".join(part.description.split()) for part in parsed.params if part.description
        }
    return found
