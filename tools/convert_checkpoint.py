#!/usr/bin/env python
"""Turn a model from one form into another, a few rows of its weights at a time.

    tools/convert_checkpoint.py --from-run runs/demo --to-hf DIR      # for transformers
    tools/convert_checkpoint.py --from-run runs/demo --to DIR         # for megatron_iiet.models.load
    tools/convert_checkpoint.py --from-hf LLAMA --to DIR --solver.kind iiet --solver.iterations 0
    tools/convert_checkpoint.py --from-model DIR --to-hf LLAMA --as-llama
    tools/convert_checkpoint.py --refresh EXPORT                      # an older version's: its code

What a training run reads (training.initial_weights, distillation.teacher) may be any of these forms.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_iiet.config import ArgumentParser, RunConfig, exit_with_error
from megatron_iiet.config.solvers import SOLVERS
from megatron_iiet.config.strict_yaml import parse_value

if TYPE_CHECKING:
    from torch import Tensor

SOLVER_OPTIONS = [name for name in SOLVERS.types if name != "schedule"]
DTYPES = ("fp32", "bf16", "fp16")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from-hf",
        metavar="DIR",
        help="Hugging Face folder of a LLaMA, Mistral, Qwen2 or Qwen3, or one that --to-hf wrote",
    )
    source.add_argument(
        "--from-run", metavar="RUN_DIR", help="output_dir of a training run, whatever its layout"
    )
    source.add_argument("--from-model", metavar="DIR", help="folder that --to wrote")
    source.add_argument(
        "--refresh",
        metavar="EXPORT",
        help="renew the code and settings of a folder that --to-hf of an older version wrote, in place",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--to",
        metavar="DIR",
        help="portable folder to write: config.yaml, model.safetensors in fp32, tokenizer",
    )
    target.add_argument(
        "--to-hf",
        metavar="DIR",
        help="Hugging Face folder to write, for AutoModelForCausalLM; must not exist",
    )
    parser.add_argument("--step", type=int, help="with --from-run: checkpoint of this step, not the newest")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="with --to-hf: of the weights but the solver's (default: fp32)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="with --to-hf: of one file of weights (default: 5GB)"
    )
    parser.add_argument(
        "--as-llama",
        action="store_true",
        help="with --to-hf: a plain LlamaForCausalLM (with their biases or norms a Qwen2 or Qwen3), which "
        "needs no code of its own; for kind euler",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="with --to-hf: Jinja template of conversations, a file or 'turns' (roles in plain text, and the "
        "end of a text behind what the assistant says)",
    )
    for name in SOLVER_OPTIONS:
        parser.add_argument(
            f"--solver.{name}",
            metavar="VALUE",
            help="with --from-hf, of all but an IIET; see pretrain_iiet.py --help",
        )
    arguments = parser.parse_args()
    refuse_misplaced(parser, arguments)
    return arguments


def refuse_misplaced(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    """Options that say nothing about what was asked for are mistakes."""
    if empty := [name for name, value in vars(arguments).items() if value == ""]:
        parser.error(f"--{empty[0].replace('_', '-')} is empty; give it a value")
    if arguments.refresh:
        nothing = parser.parse_args(["--refresh", arguments.refresh])
        others = [name for name, value in vars(arguments).items() if value != getattr(nothing, name)]
        if others:
            option = others[0].replace("_", "-")
            parser.error(f"--{option} is given with --refresh, which changes no weights; leave it out")
        return
    if not arguments.to and not arguments.to_hf:
        parser.error("one of the arguments --to --to-hf is required")
    for name in solver_options(arguments):
        if not arguments.from_hf:
            given, whose = ("--from-run", "run's") if arguments.from_run else ("--from-model", "model's")
            kept = "a checkpoint keeps its run's" if arguments.from_run else f"a folder keeps its {whose}"
            parser.error(f"--solver.{name} is given with {given}; {kept} solver")
    if arguments.step is not None and not arguments.from_run:
        given = "--from-hf" if arguments.from_hf else "--from-model"
        parser.error(f"--step is given with {given}; only the checkpoints of a run have steps")
    if arguments.to:
        given_options = {
            "--dtype": arguments.dtype,
            "--max-shard-size": arguments.max_shard_size,
            "--as-llama": arguments.as_llama,
            "--chat-template": arguments.chat_template,
        }
        for option, value in given_options.items():
            if value:
                parser.error(f"{option} is given with --to, whose folder has one form; use --to-hf")


def solver_options(arguments: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(arguments, f"solver.{name}") for name in SOLVER_OPTIONS}
    return {name: parse_value(value) for name, value in values.items() if value is not None}


class Weights(Protocol):
    """Parameters by our names, read when asked for."""

    def rows(self, name: str, first: int, last: int) -> Tensor: ...


class Numbers(Mapping[str, "Tensor"]):
    """Parameters of which every value that is read is a number: what is converted is used.

    Raises:
        ValueError: one is not.
    """

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._checked(self._stored[name], name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._checked(self._stored.rows(name, first, last), name)

    def _checked(self, values: Tensor, name: str) -> Tensor:
        if not all(bound.isfinite() for bound in values.aminmax()):  # without a tensor of its own
            raise ValueError(
                f"{name} holds NaN or infinity, with which a model computes nothing; use an earlier "
                "checkpoint"
            )
        return values


@dataclass(frozen=True)
class Source:
    """A model to convert."""

    description: str
    config: RunConfig
    state: Mapping[str, Tensor]
    weights: Weights
    """The same parameters, some rows at a time."""
    tokenizer_files: list[Path]
    """The one to load first."""
    hf_folder: Path | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """What is known of its training, for the model card."""


def open_source(arguments: argparse.Namespace) -> Source:
    """The model that was asked for, checked as far as it can be without reading its weights."""
    if arguments.from_hf:
        from megatron_iiet.hf.source_tokenizer import text_follows
        from megatron_iiet.storage.hugging_face import import_llama, tokenizer_files
        from megatron_iiet.storage.hugging_face.llama import is_iiet

        folder = Path(arguments.from_hf)
        config, weights = import_llama(folder, solver_options(arguments))
        if not is_iiet(folder):
            config.data.text_follows = text_follows(folder)
        numbers = Numbers(weights)
        return Source(arguments.from_hf, config, numbers, numbers, tokenizer_files(folder), folder)
    if arguments.from_model:
        from megatron_iiet.storage.portable import StoredModel

        stored = StoredModel(arguments.from_model)
        files = tokenizer_of_model(Path(arguments.from_model), stored.config)
        return Source(arguments.from_model, stored.config, Numbers(stored), Numbers(stored), files)
    from megatron_iiet.storage.checkpoint import lacks
    from megatron_iiet.storage.checkpoint_model import export_run

    run = export_run(arguments.from_run, arguments.step)
    missing = lacks(run.folder)
    return Source(
        f"{run.folder} ({missing})" if missing else str(run.folder),
        run.config,
        Numbers(run.state),
        Numbers(run.state),
        run.tokenizer_files,
        facts=facts_of_run(Path(arguments.from_run), run.folder),
    )


def facts_of_run(run: Path, checkpoint: Path) -> dict[str, str]:
    """What the run's folder says of the training up to a checkpoint."""
    from megatron_iiet.storage.checkpoint import read_config, read_state
    from megatron_iiet.training.metrics import LOG, read_log, validation_rules

    config, state = read_config(checkpoint), read_state(checkpoint)
    tokens = state.step * config.training.global_batch_size * config.data.sequence_length
    facts = {
        "data": ", ".join(Path(prefix).name for prefix in config.data.weights if prefix),
        "trained": f"{state.step:,} steps, {tokens:,} tokens in sequences of {config.data.sequence_length:,}",
    }
    log = read_log(run) if (run / LOG).is_file() else {}
    losses = {step: v["validation_loss"] for step, v in log.items() if "validation_loss" in v}
    if seen := [step for step in losses if step <= state.step]:
        rule = validation_rules({0: log[seen[-1]]})[0]
        facts["validation loss"] = (
            f"{losses[seen[-1]]:.4f} nats a token at step {seen[-1]:,} (windows: rule {rule})"
        )
    return facts


def tokenizer_of_model(folder: Path, config: RunConfig) -> list[Path]:
    """The tokenizer files of a portable folder, the one that its configuration names first."""
    from megatron_iiet.storage.hugging_face import tokenizer_files

    named = folder / Path(config.data.tokenizer).name
    others = [named.with_name(named.name + ".json"), *tokenizer_files(folder)]
    return [file for file in dict.fromkeys([named, *others]) if config.data.tokenizer and file.is_file()]


def convert(arguments: argparse.Namespace) -> str:
    """Do it; what to tell the user."""
    from megatron_iiet.models import Transformer
    from megatron_iiet.storage.portable import check_new, save

    if arguments.refresh:
        from megatron_iiet.hf.refresh import refresh

        renewed = refresh(arguments.refresh)
        return f"{arguments.refresh}: " + (f"renewed {', '.join(renewed)}" if renewed else "nothing to renew")
    target = arguments.to or arguments.to_hf
    check_new(target)
    source = open_source(arguments)
    parameters = (
        f"{Transformer.on_meta(source.config).num_parameters():,} parameters from {source.description}"
    )
    solver = f"solver {source.config.solver.kind}"
    if arguments.to:
        save(source.config, source.state, target, extra_files=source.tokenizer_files)
        names = ", ".join(file.name for file in source.tokenizer_files) or "no tokenizer"
        written = f"{solver}, {names}{note_of_tokenizer(source)}"
    else:
        written = to_hf(source, arguments, solver)
    return f"wrote {target}: {parameters}, {written}{note_of_function(source, arguments)}"


def note_of_tokenizer(source: Source) -> str:
    """What this package makes of the files that go into a portable folder."""
    from megatron_iiet.data.tokenizers.loading import load_tokenizer

    if not source.tokenizer_files:
        return ""
    known = source.config.model.vocab_size
    try:
        tokens = load_tokenizer(source.tokenizer_files[0]).vocab_size
    except ValueError as error:
        return f"\nnote: the tokenizer is copied, but cannot be used: {error}"
    return f"\nnote: the tokenizer has {tokens:,} tokens, but the model knows {known:,}" * (tokens > known)


def note_of_function(source: Source, arguments: argparse.Namespace) -> str:
    """What a user must know of a source that gets a solver: it was trained as explicit Euler."""
    solver, layers, where = source.config.solver, source.config.model.num_layers, source.description
    given = {name: getattr(arguments, f"solver.{name}") for name in solver_options(arguments)}
    if not given or solver.starts_as_llama(layers):
        return ""
    options = " ".join(f"--solver.{name} {shlex.quote(value)}" for name, value in given.items())
    schedule = ", with a solver.schedule that lets the iterations come in" if "iterations" in given else ""
    return (
        f"\nnote: with solver {solver.describe(solver.iterations_per_layer(layers))} these weights compute "
        f"another function than {where}, which was trained as explicit Euler. Train it before use: "
        f"pretrain_iiet.py --model.from {where} --training.initial_weights {where} {options}{schedule} "
        "(docs/regimes.md)."
    )


def to_hf(source: Source, arguments: argparse.Namespace, solver: str) -> str:
    """Write a Hugging Face folder; what is in it."""
    from megatron_iiet.config.hugging_face import FAMILIES
    from megatron_iiet.hf.export import export_folder, extras_of_folder, plain_family
    from megatron_iiet.hf.tokenizer import extras_of_tokenizer
    from megatron_iiet.storage.hugging_face.shards import parse_bytes

    size = parse_bytes(arguments.max_shard_size or "5GB")
    if source.hf_folder is not None:
        extras = extras_of_folder(source.hf_folder)
    else:
        extras = extras_of_tokenizer(source.tokenizer_files[0] if source.tokenizer_files else None)
        if source.config.data.text_follows == "bos":
            told = (
                "the model knows texts behind a bos_token: see that AutoTokenizer of the folder puts it there"
            )
            extras = replace(extras, note="; ".join(filter(None, (extras.note, told))))
    dtype = arguments.dtype or "fp32"
    written = export_folder(
        source.config,
        source.weights,
        arguments.to_hf,
        extras,
        dtype=dtype,
        max_shard_bytes=size,
        as_llama=arguments.as_llama,
        chat_template=arguments.chat_template,
        facts=source.facts,
    )
    kind = f"a plain {FAMILIES[plain_family(source.config.model)].title}" if arguments.as_llama else solver
    count = len(written.weight_files)
    files = "1 file" if count == 1 else f"{count} files"
    description = ", ".join([kind, f"{dtype} in {files}", *written.files])
    return "".join([description, *(f"\nnote: {note}" for note in written.notes)])


def main() -> None:
    arguments = parse_arguments()
    from megatron_iiet.durable import leave_cleanly_on_sigterm

    leave_cleanly_on_sigterm()
    try:
        print(convert(arguments))
    except (ValueError, OSError) as error:
        exit_with_error(str(error))


if __name__ == "__main__":
    main()
