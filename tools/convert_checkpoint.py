#!/usr/bin/env python
"""Turn a Hugging Face LLaMA checkpoint, or a training checkpoint of a run, into a portable model folder.

The result (config.yaml, model.safetensors in fp32, the tokenizer) is read by megatron_iiet.models.load.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, NoReturn

from megatron_iiet.config import exit_with_error
from megatron_iiet.config.schema import SolverConfig
from megatron_iiet.config.strict_yaml import parse_value

SOLVER_OPTIONS = [field.name for field in fields(SolverConfig) if field.name != "schedule"]


class Parser(argparse.ArgumentParser):
    """Shows errors the way every script of this repository does."""

    def error(self, message: str) -> NoReturn:
        exit_with_error(message)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-hf", metavar="DIR", help="LLaMA folder: config.json and safetensors")
    source.add_argument("--from-run", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="with --from-run: checkpoint of this step, not the newest")
    for name in SOLVER_OPTIONS:
        parser.add_argument(
            f"--solver.{name}", metavar="VALUE", help="with --from-hf; see pretrain_iiet.py --help"
        )
    arguments = parser.parse_args()
    given = solver_options(arguments)
    if arguments.from_run and given:
        parser.error(
            f"--solver.{next(iter(given))} is given with --from-run; a checkpoint keeps its run's solver"
        )
    if arguments.from_hf and arguments.step is not None:
        parser.error("--step is given with --from-hf; only the checkpoints of a run have steps")
    return arguments


def solver_options(arguments: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(arguments, f"solver.{name}") for name in SOLVER_OPTIONS}
    return {name: parse_value(value) for name, value in values.items() if value is not None}


def convert(arguments: argparse.Namespace) -> str:
    """Do it; what to tell the user."""
    from megatron_iiet.models import Transformer
    from megatron_iiet.models.portable import check_new, save

    check_new(arguments.to)
    if arguments.from_hf:
        from megatron_iiet.hf import import_llama, tokenizer_files

        config, state = import_llama(arguments.from_hf, solver_options(arguments))
        source, files = arguments.from_hf, tokenizer_files(arguments.from_hf)
    else:
        from megatron_iiet.training.export import export_run

        exported = export_run(arguments.from_run, arguments.step)
        config, state, source, files = (
            exported.config,
            exported.state,
            exported.folder,
            exported.tokenizer_files,
        )
    save(config, state, arguments.to, extra_files=files)
    parameters = Transformer.on_meta(config).num_parameters()
    names = ", ".join(file.name for file in files) or "no tokenizer"
    return (
        f"wrote {arguments.to}: {parameters:,} parameters from {source}, solver {config.solver.kind}, {names}"
    )


def main() -> None:
    arguments = parse_arguments()
    try:
        print(convert(arguments))
    except (ValueError, OSError) as error:
        exit_with_error(str(error))


if __name__ == "__main__":
    main()
