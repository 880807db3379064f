"""The whole way from a trained model to a plan: check, load, measure, decide, write."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_iiet import durable
from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.config.solvers import SOLVERS, Iterating
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.distillation import figures
from megatron_iiet.distillation.influence import Ablation, Measurement, ablate, measure_influence
from megatron_iiet.distillation.plans import PlanRequest, rank_correlation
from megatron_iiet.distillation.texts import TextSet, open_text_set
from megatron_iiet.evaluation.forward import ForwardModel, forward_config
from megatron_iiet.models.iterations import above_threshold, auto_threshold
from megatron_iiet.ops import chosen_backend
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.storage import portable
from megatron_iiet.storage.source import Source, open_model
from megatron_iiet.training.warm_start import why_reduced

INFLUENCE, PLAN = "influence.json", "plan.json"
Prepared = tuple[Source, RunConfig, TextSet]
VERSION = 1
"""Of influence.json."""


@dataclass(frozen=True)
class Options:
    """What tools/iteration_influence.py was asked for."""

    model: str
    """A run's output_dir, one of its checkpoints, or a portable model folder."""
    output: Path
    """Folder to write into."""
    request: PlanRequest
    data: str = ""
    """A corpus or a file of text; empty: what the run validates on."""
    tokenizer: str = ""
    """Empty: the model's own."""
    sequences: int = 256
    micro_batch_size: int = 8
    sequence_length: int | None = None
    """None: the model's own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ablation: bool = False


@dataclass(frozen=True)
class Result:
    """What was found, the same on every rank."""

    measured: Measurement
    ablation: Ablation | None
    plan: IterationPlan


def analyse(options: Options) -> Result:
    """Check, measure, plan, and let the main rank print and write it.

    Raises:
        ValueError: (and its subclass ConfigError) as :func:`prepare`.
    """
    prepared = prepare(options, launch_environment().world_size)
    with ParallelContext.start(options.parallel) as context:
        return run(options, prepared, context)


def prepare(options: Options, world_size: int) -> Prepared:
    """Check everything, before processes wait for each other and weights are loaded.

    Raises:
        ValueError: (and its subclass ConfigError) an option out of range, a model or a text that cannot be
            used, or a grid that fits neither the model nor ``world_size`` processes.
    """
    if options.request.ranking == "loss" and not options.ablation:
        raise ValueError("--rank-by is 'loss', which is not measured without --ablation; add it")
    for name in ("sequences", "micro_batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1"
            )
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output is {options.output}, which is no folder; name another")
    source = open_model(options.model, "--model")
    full = full_iterations(source, options.model)
    options.request.check(source.config.model.num_layers, full)
    length = options.sequence_length
    config = forward_config(
        source.config,
        options.parallel,
        options.precision,
        length=source.config.data.sequence_length if length is None else length,
        micro_batch_size=options.micro_batch_size,
        world_size=world_size,
        tokenizer=options.tokenizer or portable.tokenizer_path(source.config.data.tokenizer, options.model),
    )
    text = open_text_set(options.data, config.data, config.model.vocab_size, options.sequences)
    return source, config, text


def full_iterations(source: Source, path: str) -> int:
    """Iterations of every layer of a model that has all of them.

    Raises:
        ValueError: it has none, or is a reduced model already.
    """
    config, solver = source.config, source.config.solver
    if not isinstance(solver, Iterating):
        raise ValueError(
            f"--model is {path}, whose solver is '{solver.kind}', which has no iterations; give a model of "
            f"solver.{join_words(SOLVERS.systems_with('iterations'))}"
        )
    iterations = iterations_per_layer(config)
    if why := why_reduced(config):
        raise ValueError(
            f"--model is {path}, which {why}: it is already reduced; give the full model it was made from"
        )
    if not iterations[0]:
        raise ValueError(
            f"--model is {path}, whose layers have no iterations (r = 0); give one that iterates"
        )
    return iterations[0]


def run(options: Options, prepared: Prepared, context: ParallelContext) -> Result:
    """The work behind all checks, on this process's place of the grid; every rank calls it."""
    source, config, text = prepared
    if context.is_main:
        options.output.mkdir(parents=True, exist_ok=True)
    batches = ValidationBatches(
        text.sources,
        text.weights,
        samples=options.sequences,
        micro_batch_size=options.micro_batch_size,
        dp_rank=context.data.rank,
        dp_size=context.data.size,
    )
    model = ForwardModel(source, config, context, chosen_backend(context.device, tell=context.is_main))
    layers, full = config.model.num_layers, iterations_per_layer(config)[0]

    def say(line: str) -> None:
        if context.is_main:
            print(line, flush=True)

    say(f"model: {source.description}: {layers} layers of {full} iterations, {config.training.precision}")
    say(
        f"data: {text.description}: {batches.samples} sequences of {config.data.sequence_length} tokens, "
        f"windows by the rule {batches.rule}"
    )
    started = time.perf_counter()
    measured = measure_influence(model, batches, with_loss=options.ablation)
    seconds = time.perf_counter() - started
    say(f"measured on {measured.tokens:,} tokens in {seconds:.1f} s")
    ablation = None
    if options.ablation:
        assert measured.loss is not None
        passes = layers * full
        say(
            f"ablation: {passes} more forward passes over the {measured.sequences} sequences, one for each "
            f"iteration of each layer; about {passes * seconds:,.0f} s"
        )
        ablation = ablate(model, batches, full, measured.loss, say)
    facts: dict[str, str | int] = {
        "model": source.description,
        "data": text.description,
        "sequences": measured.sequences,
        "windows": batches.rule,
        "tokens": measured.tokens,
        "sequence_length": config.data.sequence_length,
    }
    plan = options.request.plan(measured, ablation, model.meta_model, config.data.sequence_length, facts)
    if context.is_main:
        _report(options.output, measured, ablation, plan, config.training.precision, say)
    context.barrier()
    return Result(measured, ablation, plan)


def _report(
    folder: Path,
    measured: Measurement,
    ablation: Ablation | None,
    plan: IterationPlan,
    precision: str,
    say: Callable[[str], None],
) -> None:
    """Print and write everything."""
    say(figures.table(measured, plan))
    tau_of_paper = auto_threshold(measured.influence)
    by_rule = above_threshold(measured.influence, len(measured.block_influence), tau_of_paper)
    data: dict[str, Any] = {
        "version": VERSION,
        **(plan.measured_on or {}),
        "precision": precision,
        "iterations": plan.full,
        "influence": figures.as_rows(measured.influence),
        "block_influence": measured.block_influence,
        "plan": list(plan.iterations),
        "paper_rule": {"threshold": tau_of_paper, "iterations": by_rule},
        "ablation": None,
    }
    if ablation is not None:
        correlation = rank_correlation(measured.influence, ablation.increase)
        data["ablation"] = {
            "loss": ablation.loss,
            "loss_without": figures.as_rows(ablation.losses),
            "increase": figures.as_rows(ablation.increase),
            "rank_correlation": None if math.isnan(correlation) else correlation,
        }
        say(
            f"Spearman's rank correlation of influence and rise of the loss over {len(ablation.losses)} "
            f"iterations: {correlation:.3f}"
        )
    durable.write_text(folder / INFLUENCE, json.dumps(data, indent=2) + "\n")
    pictures = figures.draw(measured, plan, folder)
    plan.write(folder / PLAN)
    tau = "" if plan.threshold is None else f" {plan.threshold:.6g}"
    by_loss = " of the loss" if plan.ranking == "loss" else ""
    say(
        f"plan by {plan.method}{tau}{by_loss}: r = {list(plan.iterations)}, {plan.evaluations} of "
        f"{plan.full_evaluations} evaluations ({plan.evaluations / plan.full_evaluations:.1%})"
    )
    kept = f"{sum(by_rule)} of {len(by_rule) * plan.full} iterations"
    say(f"paper's rule, threshold {tau_of_paper:.6g}: r = {by_rule}, {kept}")
    written = [folder / INFLUENCE, folder / PLAN, *pictures]
    say(f"wrote {', '.join(str(path) for path in written)}")
