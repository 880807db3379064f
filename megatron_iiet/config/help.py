"""The ``--help`` text: every key with its explanation, type and default; those of the solvers by kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from megatron_iiet.config.changes import ACCEPT_CHANGES
from megatron_iiet.config.keys import section_names
from megatron_iiet.config.schema import RunConfig
from megatron_iiet.config.solvers import (
    DEFAULT_SOLVER,
    SOLVERS,
    SolverConfig,
    name_fields,
    own_keys,
    section_types,
)

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
    for flag, stands_for in short.items():
        parser.add_argument(
            flag, metavar=stands_for.rsplit(".", 1)[-1].upper(), help=f"Short for {stands_for}."
        )
    parser.add_class_arguments(RunConfig, skip={"solver"})
    for action in parser._actions:
        if action.dest in section_names():
            action.help = argparse.SUPPRESS  # jsonargparse offers `--model FILE`; one way is enough
    _add_solvers(parser)
    for action in parser._actions:
        # jsonargparse offers `--data.split+ VALUE`, which appends to a list; one way is enough
        action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
    parser.add_argument(
        f"--{ACCEPT_CHANGES}",
        metavar="KEY[,KEY...]",
        help="Go on from the checkpoint although these keys have changed, which is refused otherwise "
        "(docs/resume.md). Holds for this start and is recorded; no key of a YAML file.",
    )
    return str(parser.format_help())


def _add_solvers(parser: ArgumentParser) -> None:
    """A group of keys for each solver; a key of several stands with the first of them."""
    types, defaults = section_types(), name_fields(DEFAULT_SOLVER)
    naming = parser.add_argument_group("How its layers are integrated; the keys depend on the kind")
    summaries = {solver().system: _summary(solver) for solver in SOLVERS}
    listed = "; ".join(f"{system.removeprefix('kind ')}: {summary}" for system, summary in summaries.items())
    naming.add_argument("--solver.kind", type=types["kind"], default=defaults["kind"], help=f"{listed}.")
    naming.add_argument(
        "--solver.variant",
        type=types["variant"],
        default=defaults["variant"],
        help="Which reading of the kind, where it has several.",
    )
    shown: dict[str, str] = {}
    for solver in SOLVERS:
        system, keys, texts = solver().system, own_keys(solver), attribute_docs(solver)
        elsewhere = [f"--solver.{name} (see {shown[name]})" for name in keys if name in shown]
        group = parser.add_argument_group(
            f"Solver of {system}",
            f"{_summary(solver)}. Also: {', '.join(elsewhere)}" if elsewhere else _summary(solver),
        )
        for name, default in ((f.name, f.default) for f in fields(solver) if f.name in keys):
            if name not in shown:
                group.add_argument(f"--solver.{name}", type=types[name], default=default, help=texts[name])
                shown[name] = system


def _summary(solver: type[SolverConfig]) -> str:
    """A declaration's docstring, a sentence without its stop."""
    return " ".join((solver.__doc__ or "").split()).rstrip(".")


def attribute_docs(solver: type[SolverConfig]) -> dict[str, str]:
    """The docstring under each key of a declaration, also of an inherited one."""
    from docstring_parser import parse_from_object

    found: dict[str, str] = {}
    for cls in reversed(inspect.getmro(solver)[:-1]):
        parsed = parse_from_object(cls)
        found |= {
            part.arg_name: " ".join(part.description.split()) for part in parsed.params if part.description
        }
    return found
