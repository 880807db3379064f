"""Every check of values, for range and for fitting together, that needs neither files nor processes; types
and literal choices are checked while loading."""

from __future__ import annotations

import math
import os
from dataclasses import fields, is_dataclass

from megatron_iiet.config.combinations import check_layout
from megatron_iiet.config.errors import ConfigError
from megatron_iiet.config.injection import Injection
from megatron_iiet.config.keys import join_words
from megatron_iiet.config.rope import read_rope_scaling
from megatron_iiet.config.schema import RunConfig, evaluations_in_budget
from megatron_iiet.config.solvers import SOLVERS, SUM_TOLERANCE, Iterating
from megatron_iiet.config.timeouts import read_timeouts


def validate(config: RunConfig) -> None:
    """Check a configuration's values, alone and together.

    Raises:
        ConfigError: the first value or combination that cannot be trained, with what to do about it.
    """
    _check_ranges(config)
    _check_attention(config)
    read_timeouts(config.parallel.timeouts)
    _check_data(config)
    _check_skipped(config)
    _check_profile(config)
    config.solver.check(config.model.num_layers)
    _check_schedule(config)
    _check_batch(config)
    _ = config.training.wall_seconds
    _check_guidance(config)
    _check_tasks(config)
    for fault in config.debug.inject:
        Injection.read(fault)
    check_layout(config)


def _check_ranges(config: RunConfig) -> None:
    # In the order of the schema, so that the first complaint is about the first wrong line of a file.
    for section in fields(config):
        values = getattr(config, section.name)
        for leaf in fields(values) if is_dataclass(values) else ():
            name, value = f"{section.name}.{leaf.name}", getattr(values, leaf.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise ConfigError(f"{name} is {value}, but must be a finite number")
            for allowed in leaf.metadata["ranges"]:
                if value not in allowed:
                    raise ConfigError(f"{name} is {value}, but must {allowed.must}")
    if not config.output_dir:
        raise ConfigError("output_dir is empty; name the folder for checkpoints and logs")


def _check_attention(config: RunConfig) -> None:
    model = config.model
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size is {model.hidden_size}, but must be a multiple of model.num_attention_heads "
            f"= {model.num_attention_heads}; change one of them"
        )
    sizes = "model.hidden_size / model.num_attention_heads"
    if model.head_width % 2:
        what, instead = f"model.head_dim is {model.head_dim}", "change it"
        if model.head_dim is None:
            what = f"{sizes} is {model.hidden_size} / {model.num_attention_heads} = {model.head_width}"
            instead = "change one of them, or set model.head_dim"
        raise ConfigError(f"{what}, but rotary embeddings need an even head width; {instead}")
    if model.num_attention_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_key_value_heads is {model.num_kv_heads}, but must divide model.num_attention_heads = "
            f"{model.num_attention_heads}; change one of them, or write null for as many as query heads"
        )
    read_rope_scaling(model.rope_scaling)


def _check_data(config: RunConfig) -> None:
    _check_blend(config)
    data, longest = config.data, config.model.max_position_embeddings
    if data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but must not exceed "
            f"model.max_position_embeddings = {longest}; lower the first or raise the second"
        )
    split = data.split
    if len(split) != 3:
        raise ConfigError(
            f"data.split is {split}, but must have three shares (train, validation, test), "
            "e.g. [0.98, 0.02, 0.0]"
        )
    if not all(math.isfinite(share) and 0 <= share <= 1 for share in split) or split[0] == 0:
        raise ConfigError(
            f"data.split is {split}, but its shares must lie between 0 and 1, the first (train) above 0"
        )
    if abs(sum(split) - 1) > SUM_TOLERANCE:
        raise ConfigError(f"data.split is {split}, which sums to {sum(split):.6g}; the shares must sum to 1")


def _check_skipped(config: RunConfig) -> None:
    steps = config.training.steps
    for each in config.data.skip_steps:
        pair = each if isinstance(each, list) else [each, each]
        if len(pair) != 2 or not 1 <= pair[0] <= pair[1] <= steps:
            raise ConfigError(
                f"data.skip_steps has {each}, but must have steps or pairs [first, last] of the steps 1 to "
                f"training.steps = {steps}"
            )


def _check_profile(config: RunConfig) -> None:
    pair, steps = config.logging.profile, config.training.steps
    if pair is not None and (len(pair) != 2 or not 1 <= pair[0] <= pair[1] <= steps):
        raise ConfigError(
            f"logging.profile is {pair}, but must be [first, last] of the steps 1 to training.steps = {steps}"
        )


def _check_blend(config: RunConfig) -> None:
    data = config.data
    if data.blend and data.prefix:
        raise ConfigError(
            f"data.prefix is {data.prefix}, but data.blend names corpora too; keep one of them "
            "(--data.prefix= unsets the first)"
        )
    seen: dict[str, str] = {}
    for prefix, weight in data.blend.items():
        if not (isinstance(prefix, str) and prefix):
            raise ConfigError(
                f"data.blend gives {prefix!r} a weight, which is no path; write the prefix of a corpus, in "
                "quotes if it is a number"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"data.blend gives {prefix} the weight {weight}, but weights must be finite and greater than "
                "0; leave out what should not be read"
            )
        path = os.path.normpath(prefix)
        if path in seen:
            raise ConfigError(
                f"data.blend names one corpus twice, as {seen[path]} and as {prefix}; add up their weights"
            )
        seen[path] = prefix
    trained_on = [os.path.normpath(prefix) for prefix in data.weights]
    if data.validation_prefix and os.path.normpath(data.validation_prefix) in trained_on:
        raise ConfigError(
            f"data.validation_prefix is {data.validation_prefix}, which is trained on; name another corpus, "
            "or give validation a share in data.split"
        )


def _check_schedule(config: RunConfig) -> None:
    optimizer = config.optimizer
    if optimizer.schedule == "wsd" and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
        raise ConfigError(
            f"optimizer.decay_fraction is {optimizer.decay_fraction}, which with optimizer.warmup_fraction "
            f"{optimizer.warmup_fraction} is more than all steps; lower one of them"
        )


def _check_batch(config: RunConfig) -> None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % micro:
        choices = f"{batch // micro * micro} or {-(-batch // micro) * micro}" if batch > micro else f"{micro}"
        raise ConfigError(
            f"training.global_batch_size is {batch}, but must be a multiple of training.micro_batch_size = "
            f"{micro}; set it to {choices}"
        )


def _check_guidance(config: RunConfig) -> None:
    guidance, solver, layers = config.guidance, config.solver, config.model.num_layers
    if not guidance.interval:
        return
    given = f"guidance.interval is {guidance.interval}, but"
    if config.distillation.teacher:
        raise ConfigError(
            f"{given} distillation.teacher is {config.distillation.teacher}: a student's iterations are "
            "planned before it is trained; set guidance.interval to 0"
        )
    if not isinstance(solver, Iterating):
        kinds = join_words([f"'{kind.removeprefix('kind ')}'" for kind in SOLVERS.systems_with("iterations")])
        raise ConfigError(
            f"{given} solver.kind is '{solver.kind}', which has no iterations to guide; set "
            f"guidance.interval to 0 or solver.kind to {kinds}"
        )
    if not solver.merges_without_iterations:
        raise ConfigError(
            f"{given} solver.predictor is 'euler', with which a layer without iterations does not merge; set "
            "solver.predictor to 'merged' or guidance.interval to 0"
        )
    if not isinstance(solver.iterations, int) or solver.iterations < 1:
        raise ConfigError(
            f"{given} solver.iterations is {solver.iterations}; make it the most iterations a layer may get, "
            "one number of at least 1, or set guidance.interval to 0"
        )
    if solver.schedule is not None:
        raise ConfigError(
            f"{given} solver.schedule gives every stage its iterations; set solver.schedule to null "
            "(guidance.start delays guidance) or guidance.interval to 0"
        )
    full = layers * solver.evaluations(solver.iterations)
    if evaluations_in_budget(config) < layers:
        raise ConfigError(
            f"guidance.budget is {guidance.budget} of the {full} evaluations of {solver.iterations} "
            f"iterations in {layers} layers, which leaves less than one a layer; set it to at least "
            f"{math.ceil(1000 * layers / full) / 1000:g}"
        )
    interval, start = guidance.interval, round(guidance.start * config.training.steps)
    first = max(1, -(-start // interval)) * interval
    if first >= config.training.steps:
        raise ConfigError(
            f"{given} the first measurement, after step {first} (guidance.start is {guidance.start:g}), "
            f"would not be before the end, training.steps = {config.training.steps}; lower guidance.interval "
            "or guidance.start"
        )
    if not (config.data.split[1] or config.data.validation_prefix):
        raise ConfigError(
            f"{given} there is no held-out text to measure on: data.split is {config.data.split} and "
            "data.validation_prefix is empty; give validation a share in data.split"
        )


def _check_tasks(config: RunConfig) -> None:
    tasks = config.evaluation.tasks
    if not all(task.strip() for task in tasks):
        raise ConfigError(
            f"evaluation.tasks is {tasks}, but every entry must be the name of a task; remove the empty one"
        )
