"""What cannot be combined: layouts, run settings and DeepSpeed settings, in one table, which a test compares
with that of docs/parallelism.md. It is read before any process waits for another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.rules import DEEPSPEED_RULES, STAGE, Rule, Setup
from megatron_iiet.config.schema import RunConfig

_FP8_MULTIPLE = 16
"""Of the sides of matrices that GPUs multiply in fp8."""


def check_combination(config: RunConfig, ds: Mapping[str, Any], world_size: int, source: str) -> int:
    """Check that a run can be laid out on ``world_size`` processes; returns its data-parallel size.

    ``ds`` is the DeepSpeed JSON as it was read, before reconciliation; ``source`` is how messages name it.
    Needs no process group.

    Raises:
        ConfigError: the first combination of the table that applies, with the nearest legal choice.
    """
    setup = Setup(config, ds, world_size, source)
    _raise_first(COMBINATIONS, setup)
    return setup.data_parallel_size


def check_layout(config: RunConfig) -> None:
    """The rows of the table that the run configuration alone decides.

    Raises:
        ConfigError: as :func:`check_combination`.
    """
    _raise_first(LAYOUT_RULES, Setup(config, {}, 0, ""))


def gradient_accumulation_steps(config: RunConfig, data_parallel_size: int) -> int:
    """Forward passes per optimizer step on each of ``data_parallel_size`` ranks.

    Raises:
        ConfigError: the global batch does not divide evenly over the replicas of the model; names the
            numbers, the nearest global batch sizes and the nearest numbers of ranks.
    """
    if problem := _batch_problem(config, data_parallel_size):
        raise ConfigError(problem)
    return config.training.global_batch_size // (config.training.micro_batch_size * data_parallel_size)


def tensor_sizes(config: RunConfig) -> list[int]:
    """Every legal parallel.tensor of this model, smallest first."""
    widths = _split_widths(config).values()
    return [size for size in range(1, min(widths) + 1) if not any(width % size for width in widths)]


def _raise_first(rules: Iterable[Rule], setup: Setup) -> None:
    for rule in rules:
        if problem := rule.problem(setup):
            raise ConfigError(problem)


def _split_widths(config: RunConfig) -> dict[str, int]:
    """What tensor parallelism divides, by the name to show."""
    model = config.model
    return {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_key_value_heads": model.num_kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "the padded vocabulary": model.padded_vocab_size,
    }


def _nearest(value: int, legal: Iterable[int]) -> str:
    """The nearest legal numbers below and above ``value``: "4 or 8"; empty if there is none."""
    legal = list(legal)
    below, above = [n for n in legal if n < value], [n for n in legal if n > value]
    return join_words([str(n) for n in [*below[-1:], *above[:1]]]) if below or above else ""


def _multiples(unit: int, value: int) -> list[int]:
    """The multiples of ``unit``, 0 excepted, around ``value``."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def _tensor_problem(setup: Setup) -> str | None:
    size = setup.config.parallel.tensor
    misfits = [f"{name} = {width}" for name, width in _split_widths(setup.config).items() if width % size]
    if not misfits:
        return None
    return (
        f"parallel.tensor is {size}, but does not divide {', '.join(misfits)}; set it to "
        f"{_nearest(size, tensor_sizes(setup.config))}"
    )


def _pipeline_problem(setup: Setup) -> str | None:
    stages, layers = setup.config.parallel.pipeline, setup.config.model.num_layers
    if stages <= layers:
        return None
    return (
        f"parallel.pipeline is {stages}, but model.num_layers is {layers} and every stage needs a layer; set "
        f"it to {layers} or less"
    )


def _sequence_problem(setup: Setup) -> str | None:
    length, size = setup.config.data.sequence_length, setup.config.parallel.tensor
    if not setup.config.parallel.sequence or length % size == 0:
        return None
    return (
        f"data.sequence_length is {length}, but parallel.sequence cuts it into parallel.tensor = {size} "
        f"equal parts; set it to {_nearest(length, _multiples(size, length))}, or parallel.sequence to false"
    )


def _grid_problem(setup: Setup) -> str | None:
    world, parallel = setup.world_size, setup.config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if world % (tensor * pipeline) == 0:
        return None
    layers = setup.config.model.num_layers
    tensors = [size for size in tensor_sizes(setup.config) if world % (size * pipeline) == 0]
    pipelines = [size for size in range(1, layers + 1) if world % (size * tensor) == 0]
    choices = [f"start {_nearest(world, _multiples(tensor * pipeline, world))}"]
    for name, size, legal in (("tensor", tensor, tensors), ("pipeline", pipeline, pipelines)):
        if legal:
            choices.append(f"set parallel.{name} to {_nearest(size, legal)}")
    return (
        f"the number of processes is {world}, but must be a multiple of parallel.tensor x parallel.pipeline, "
        f"{tensor} x {pipeline} = {tensor * pipeline}; {join_words(choices)}"
    )


def _batch_problem(config: RunConfig, data_parallel_size: int) -> str | None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    unit, replica = micro * data_parallel_size, config.parallel.tensor * config.parallel.pipeline
    if batch % unit == 0:
        return None
    legal = [size * replica for size in range(1, batch // micro + 1) if batch % (micro * size) == 0]
    ranks = _nearest(data_parallel_size * replica, legal)
    return (
        f"training.global_batch_size is {batch}, but must be a multiple of training.micro_batch_size times "
        f"the data-parallel ranks, {micro} x {data_parallel_size} = {unit}; set it to "
        f"{_nearest(batch, _multiples(unit, batch))}, or start {ranks} {'rank' if ranks == '1' else 'ranks'}"
    )


def _replicas_problem(setup: Setup) -> str | None:
    interval = setup.config.guards.replicas
    if not interval or setup.setting(STAGE) != 3:
        return None
    return (
        f"guards.replicas is {interval}, but with ZeRO stage 3 ({setup.source}) every rank holds a part of "
        "the parameters and there is nothing to compare; set it to 0, or zero_optimization.stage to 2"
    )


def _compile_problem(setup: Setup) -> str | None:
    compiled = setup.config.training.compile
    if compiled == "off" or setup.setting(STAGE) != 3:
        return None
    return (
        f"training.compile is {compiled}, but with ZeRO stage 3 ({setup.source}) the parameters of F are "
        "gathered within it, which a graph cannot do; set it to off, or zero_optimization.stage to 2"
    )


def _fp8_problem(setup: Setup) -> str | None:
    training, model, size = setup.config.training, setup.config.model, setup.config.parallel.tensor
    if training.fp8 == "off":
        return None
    if training.precision != "bf16":
        return (
            f"training.fp8 is {training.fp8}, but training.precision is {training.precision} and fp8 is "
            "rounded from bf16; set the one to off, or the other to bf16"
        )
    if training.compile != "off":
        return (
            f"training.fp8 is {training.fp8}, but training.compile is {training.compile}, which was not "
            "tried with it; set one of them to off"
        )
    query, kv = (n * model.head_width for n in (model.num_attention_heads, model.num_kv_heads))
    widths = {
        "model.hidden_size": model.hidden_size,
        "query heads x their width / parallel.tensor": query // size,
        "query, key and value heads x their width / parallel.tensor": (query + 2 * kv) // size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // size,
        "training.micro_batch_size x data.sequence_length": training.micro_batch_size
        * setup.config.data.sequence_length,
    }
    misfits = [f"{name} is {width}" for name, width in widths.items() if width % _FP8_MULTIPLE]
    if not misfits:
        return None
    return (
        f"training.fp8 is {training.fp8}, but {join_words(misfits, 'and')}, and GPUs multiply fp8 in "
        f"multiples of {_FP8_MULTIPLE}; change it, or set training.fp8 to off"
    )


LAYOUT_RULES = (
    Rule(
        "`parallel.tensor` that does not divide query heads, key/value heads, feed-forward width and padded "
        "vocabulary",
        "every rank holds an equal part of each",
        "a common divisor",
        _tensor_problem,
    ),
    Rule(
        "`parallel.pipeline` > `model.num_layers`",
        "every stage needs a layer",
        "at most as many stages as layers",
        _pipeline_problem,
    ),
    Rule(
        "`parallel.sequence` with a `data.sequence_length` that `parallel.tensor` does not divide",
        "every rank holds an equal part of a sequence",
        "a multiple of `parallel.tensor`",
        _sequence_problem,
    ),
    Rule(
        "`training.fp8` with another `training.precision` than bf16, with `training.compile`, or with "
        "widths, or tokens of a micro-batch, that are no multiples of 16 on every rank",
        "GPUs multiply fp8 so, and nothing else was tried",
        "set it to `off`, or what it does not go with",
        _fp8_problem,
    ),
)
"""Rows that the run configuration alone decides."""

COMBINATIONS: tuple[Rule, ...] = (
    *LAYOUT_RULES,
    # The number of processes; the second row counts on the first.
    Rule(
        "a number of processes that is no multiple of `parallel.tensor` x `parallel.pipeline`",
        "every replica of the model takes that many",
        "a multiple",
        _grid_problem,
    ),
    Rule(
        "`training.global_batch_size` that is no multiple of `training.micro_batch_size` x data-parallel "
        "ranks",
        "every rank does the same number of equal micro-batches",
        "a multiple",
        lambda setup: _batch_problem(setup.config, setup.data_parallel_size),
    ),
    Rule(
        "`guards.replicas` > 0 with `zero_optimization.stage` 3",
        "every rank holds a part of the parameters, and there is nothing to compare",
        "set it to 0, or the stage to 2",
        _replicas_problem,
    ),
    Rule(
        "`training.compile` `layer` with `zero_optimization.stage` 3",
        "the parameters of F are gathered within it, which a graph cannot do",
        "set it to `off`, or the stage to 2",
        _compile_problem,
    ),
    *DEEPSPEED_RULES,
)
