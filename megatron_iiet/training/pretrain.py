"""Pretraining from a configuration: build everything, check everything, train."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_iiet.config import ConfigError, LoadedConfig, RunConfig, gradient_accumulation_steps
from megatron_iiet.config.changes import ACCEPT_CHANGES
from megatron_iiet.config.combinations import check_combination
from megatron_iiet.config.deepspeed import load_ds_config, reconcile
from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.data.loader.validation import SPREAD, ValidationBatches
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.installed import outside_bounds
from megatron_iiet.ops import resolve_backend
from megatron_iiet.ops.fp8 import Products
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.signals import REQUEUE, Phase
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.integrity import DamagedError
from megatron_iiet.storage.source import Source
from megatron_iiet.training import callbacks, record, resume
from megatron_iiet.training.agreement import Succession, check_shared
from megatron_iiet.training.compiling import CompileTime, prepare_compiling
from megatron_iiet.training.corpora import (
    Corpora,
    contents_of,
    describe_corpora,
    describe_validation,
    doubts_about,
    open_corpora,
)
from megatron_iiet.training.engine import Engine, engine_class
from megatron_iiet.training.faults import Faults
from megatron_iiet.training.layout import describe_layout, layout_of
from megatron_iiet.training.lock import RunLock
from megatron_iiet.training.loop import train
from megatron_iiet.training.mirror import Mirror
from megatron_iiet.training.optimizers import check_optimizer
from megatron_iiet.training.profiling import Profiling
from megatron_iiet.training.progress import Progress
from megatron_iiet.training.replicas import Replicas
from megatron_iiet.training.run import Run
from megatron_iiet.training.stopping import Stopped, failing_together, heard, stop_if_asked
from megatron_iiet.training.task_evaluation import TaskEvaluation
from megatron_iiet.training.warm_start import open_teacher, open_warm_start
from megatron_iiet.training.watchdog import Watchdog


def pretrain(loaded: LoadedConfig) -> int:
    """Train the model that a configuration describes, from scratch or from its newest checkpoint. A run that
    has taken its steps says so, and nothing is touched.

    Returns:
        the exit status: 0, or :data:`megatron_iiet.signals.REQUEUE` if it was asked to stop before its end.

    Raises:
        ConfigError: layout, configuration, data, tokenizer or checkpoint do not fit; raised before
            anything is trained or written, and a wrong layout before any process waits for another.
    """
    # What is imported stays. A collection of garbage need not look through it, which takes 0.25 s; DeepSpeed
    # makes up to eight of them while it starts.
    gc.freeze()
    try:
        ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
        with (
            heard(loaded.config, Phase.ALONE) as requests,
            ParallelContext.start(
                loaded.config.parallel, counting=loaded.config.data.documents != "ignore"
            ) as context,
        ):
            requests.enter(Phase.STARTING)
            lock = RunLock(loaded.config.output_dir) if context.is_main else None
            progress = Progress(loaded.config.parallel.resolved_timeouts, loaded.config.data.timeout)
            watchdog = Watchdog(context, progress, loaded.config.output_dir)
            try:
                run, chosen = prepare(loaded.config, ds_config, context, loaded.accept_changes, lock)
                run.progress = progress
                try:
                    finished = train(run, chosen)
                except FloatingPointError:  # of all ranks: what was asked for before is still good
                    run.finish_saving()
                    raise
                finally:
                    run.close()
            except resume.NothingToDo as done:
                if context.is_main:
                    print(done, flush=True)
                return 0
            except Stopped as reason:
                finished = False
                if context.is_main:
                    print(f"stopping on {reason} before the first step", flush=True)
            finally:
                watchdog.close()
                if lock is not None:
                    lock.release()
            context.barrier()  # so that all ranks end at once, see signals.leave
            return 0 if finished else REQUEUE
    except ConfigError:
        raise
    except ValueError as error:  # the rooms below know nothing of configurations
        raise ConfigError(str(error)) from error


def prepare(
    config: RunConfig,
    ds_config: dict[str, Any],
    context: ParallelContext,
    accept: Sequence[str] = (),
    lock: RunLock | None = None,
) -> tuple[Run, list[callbacks.Callback]]:
    """Check everything, then build the run and its callbacks; the cheapest checks come first.

    ``accept``: keys whose change this start accepts, see :func:`.resume.check_resumable`; ``lock``: the main
    rank's, which is taken before anything is written.

    Raises:
        ConfigError: (and its base ValueError) something does not fit; nothing was written.
        NothingToDo: the run has taken its steps; nothing was built or written.
        Stopped: a rank was asked to stop; nothing was trained.
    """
    check_paths(config)
    backend, reason = resolve_backend(config.ops.backend, context.device)
    check_optimizer(config.optimizer, context.device)
    Products(config.training.fp8).check(context.device)
    with failing_together(context):
        if (
            lock is not None and lock.path.exists()
        ):  # what a live run saves and removes is not for us to judge
            lock.take()
    succession, newest, done = look(config, context)
    if not done:
        with failing_together(context):
            record.check_output_dir(config.output_dir)
        check_shared(config.output_dir, context)
        with failing_together(context):
            if lock is not None:
                lock.take()
        stop_if_asked(context, lock)
        succession, newest, done = look(config, context)  # who had the lock may have saved meanwhile
    mirror = None
    if config.checkpoint.mirror and not done:
        with failing_together(context):
            mirror = Mirror(config.checkpoint.mirror) if context.is_main else None
    told = ""
    if newest is not None:
        with failing_together(context):
            config, told = resume.with_own_split(config, newest, accept)
    check_tokenizer(config)
    corpora = open_corpora(config.data, config.model.vocab_size)
    doubts = doubts_about(config.data, corpora)
    teacher = None if done else open_teacher(config)
    warm = open_warm_start(config) if newest is None else None
    contents = contents_of(config.data, corpora) | {
        "teacher": resume.model_identity(teacher) if teacher else None,
        "initial_weights": None if done else resume.initial_identity(config),
    }
    found = None if newest is None else resume.check_resumable(newest, config, contents, accept)
    if done:
        raise resume.NothingToDo("\n".join([*succession.told, done]))
    if found is not None and config.training.initial_weights and not contents["initial_weights"]:
        contents["initial_weights"] = (found.state.data.get(resume.CONTENTS) or {}).get("initial_weights")

    if config.training.compile != "off":
        with failing_together(context):
            prepare_compiling(config, context.device)
    stop_if_asked(context, lock)
    engine = engine_class(context)(
        config, ds_config, context, backend, initialise=found is None, warm=warm, teacher=teacher
    )
    stop_if_asked(context, lock)
    batches = train_batches(config, corpora, context)
    run = Run(config, ds_config, context, engine, batches, corpora.names, contents)
    run.lock, run.mirror = lock, mirror
    contents[resume.RULE] = rule = SPREAD if found is None else found.validation_rule
    held_out = validation_batches(config, corpora, context, config.evaluation.samples, rule)
    say_start(run, corpora, held_out, [*doubts, *outside_bounds()])
    run.say(f"merge_norm backend: {backend} ({reason}); optimizer: {engine.optimizer_class}")
    if warm is not None:
        run.say(warm.describe())
    if teacher is not None:
        run.say(describe_teacher(run, teacher))
    for warning in succession.told:
        run.say(f"warning: {warning}")
    if told:
        run.say(told)
    if found is not None:
        found = resume_from_newest(run, found, succession, accept)
    elif accept:
        run.say(f"--{ACCEPT_CHANGES} names {', '.join(accept)}, but there is no checkpoint to differ from")
    start = record.start_of(context, layout_of(context, engine.zero_stage), found, held_out)
    if context.is_main:
        if found is None:
            record.write_configurations(config, ds_config)
        else:  # it says what the weights there were made with, until there are newer ones
            record.restore_configuration(config.output_dir, found.folder)
        record.append_start(config.output_dir, start)
    return run, build_callbacks(config, corpora, context, held_out)


def say_start(run: Run, corpora: Corpora, held_out: ValidationBatches | None, doubts: Sequence[str]) -> None:
    """Say what is trained on what and where, and ``doubts`` about it."""
    config, engine = run.config, run.engine
    run.say(describe_start(run))
    if config.debug.inject:
        run.say(f"warning: debug.inject brings faults upon this run: {', '.join(config.debug.inject)}")
    for doubt in doubts:
        run.say(f"warning: {doubt}")
    run.say(describe_corpora(config, corpora))
    if held_out is not None:
        run.say(describe_validation(held_out, config.evaluation.samples))
    run.say(describe_layout(config, engine))
    if (
        engine.zero_stage == 3
        and config.training.precision != "fp32"
        and engine.meta_model.num_solver_parameters()
    ):
        kept = "fp32 master copy (ZeRO-3 keeps one type)"
        run.say(f"merge coefficients: {config.training.precision} working copy, {kept}")


def resume_from_newest(
    run: Run, found: resume.Resumption, succession: Succession, accept: Sequence[str]
) -> resume.Resumption:
    """Continue from the checkpoint found, or, if reading it shows damage, from the next that is whole.

    Raises:
        ConfigError: none is, or the next one does not fit.
    """
    layout = layout_of(run.context, run.engine.zero_stage)
    while True:
        left_out = describe_left_out(found, run.engine) if found.accepted else []
        run.say("\n".join((found.describe(), *describe_other_layout(found, layout), *left_out)))
        try:
            run.resume(found.folder)
        except DamagedError as error:
            run.say(f"warning: {succession.leave_out(error)}")
        else:
            return found
        next_one = succession.newest()
        assert next_one is not None  # where there was one, it raises
        found = resume.check_resumable(next_one, run.config, run.contents, accept)


def look(config: RunConfig, context: ParallelContext) -> tuple[Succession, Path | None, str]:
    """What there is to go on from, the first of that, and why there is nothing to do, if there is not.

    Raises:
        ConfigError: there are checkpoints, and none may be gone on from; ranks see different ones.
    """
    succession = Succession(config.output_dir, context)
    resume.check_may_resume(config, succession.candidates)
    newest = succession.newest()
    done = "" if newest is None else resume.nothing_to_do(config, checkpoint.read_state(newest).step)
    return succession, newest, done


def reconciled_ds_config(loaded: LoadedConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration with our values filled in; the layout is checked on the way.

    Raises:
        ConfigError: what was asked for cannot run on ``world_size`` processes.
    """
    path = loaded.ds_config_path
    ds_json = {"zero_optimization": {"stage": 1}} if path is None else load_ds_config(path)
    source = "the default DeepSpeed configuration" if path is None else str(path)
    data_parallel_size = check_combination(loaded.config, ds_json, world_size, source)
    return reconcile(ds_json, loaded.config, data_parallel_size, source=source)


def check_paths(config: RunConfig) -> None:
    """Refuse a configuration that names no corpus or no tokenizer."""
    data = config.data
    if not (data.prefix or data.blend):
        raise ConfigError("data.prefix is not set; give the path of what tools/preprocess_data.py wrote")
    if not data.tokenizer:
        raise ConfigError("data.tokenizer is not set; give the path of what tools/train_tokenizer.py wrote")


def check_tokenizer(config: RunConfig) -> None:
    """Refuse a tokenizer with more ids than the model has embedding rows."""
    size = load_tokenizer(config.data.tokenizer).vocab_size
    if size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer} has {size} ids, but model.vocab_size is "
            f"{config.model.vocab_size}; set it to at least {size}"
        )


def train_batches(config: RunConfig, corpora: Corpora, context: ParallelContext) -> TrainBatches:
    """This rank's training micro-batches."""
    return TrainBatches(
        corpora.train,
        corpora.weights,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=context.data.rank,
        data_parallel_size=context.data.size,
        seed=config.training.seed,
        num_workers=config.data.num_workers,
        timeout=config.data.timeout,
        pin_memory=context.device.type == "cuda",
        skipped=config.data.skipped,
        add_up=context.counting.all_reduce if context.counting.size > 1 else None,
    )


def build_callbacks(
    config: RunConfig, corpora: Corpora, context: ParallelContext, held_out: ValidationBatches | None
) -> list[callbacks.Callback]:
    """What happens around a step, in order; ``held_out``: what is validated on."""
    chosen: list[callbacks.Callback] = [callbacks.MetricLogger()]
    if config.training.compile != "off":
        chosen.append(CompileTime())
    if config.logging.profile:
        chosen.append(Profiling(*config.logging.profile))
    if held_out is not None:
        if config.guidance.interval:  # before validation, which is of the plan in force
            guiding = validation_batches(config, corpora, context, config.guidance.samples, held_out.rule)
            assert guiding is not None
            chosen.append(callbacks.Guidance(guiding))
        chosen.append(callbacks.Validation(held_out, config.evaluation.interval))
        if config.logging.solver_interval and config.solver.corrects:
            batch = next(iter(held_out))
            chosen.append(callbacks.SolverDiagnostics(batch, config.logging.solver_interval))
    if config.evaluation.tasks:
        chosen.append(TaskEvaluation(config))
    if config.guards.replicas:  # before what a drift must not get into
        chosen.append(Replicas(config.guards.replicas))
    chosen.append(callbacks.Checkpointing(config.checkpoint.interval))
    if config.debug.inject:
        chosen.append(Faults(config.debug.inject, context.rank))
    return chosen


def validation_batches(
    config: RunConfig, corpora: Corpora, context: ParallelContext, samples: int, rule: str
) -> ValidationBatches | None:
    """This rank's part of ``samples`` windows of the validation split, if there is one."""
    if not corpora.validation:
        return None
    return ValidationBatches(
        corpora.validation,
        corpora.validation_weights,
        samples=samples,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=context.data.rank,
        dp_size=context.data.size,
        rule=rule,
    )


def describe_start(run: Run) -> str:
    """The opening lines of a run."""
    config, model = run.config, run.engine.meta_model
    m, length = config.model, config.data.sequence_length
    batch = config.training.global_batch_size
    accumulation = gradient_accumulation_steps(config, run.context.data.size)
    return (
        f"model: {m.num_layers} layers, d {m.hidden_size}, ffn {m.ffn_hidden_size}, "
        f"{m.num_attention_heads} heads, vocabulary {m.vocab_size}: "
        f"{model.num_parameters():,} parameters, {model.num_solver_parameters():,} of them the solver's\n"
        f"training: {config.training.steps} steps of {batch * length:,} tokens in {accumulation} "
        f"micro-batches of {config.training.micro_batch_size} x {length}, {config.training.precision}, "
        f"on {run.context.world_size} {run.context.device.type} process(es)"
    )


def describe_teacher(run: Run, teacher: Source) -> str:
    """The line of a distillation's start."""
    config, model = run.config, run.engine.meta_teacher
    assert model is not None
    length = config.data.sequence_length
    share = model.forward_flops(length) / run.engine.meta_model.forward_flops(length)
    weights = config.distillation
    return (
        f"teacher: {teacher.description}, solver {model.config.solver.kind}, a forward pass of "
        f"{share:.2f} x the student's FLOPs; loss CE + {weights.alpha:g} MSE + {weights.beta:g} KL at "
        f"temperature {weights.temperature:g}"
    )


def describe_other_layout(found: resume.Resumption, here: dict[str, int]) -> list[str]:
    """What is told of a layout that differs from the checkpoint's beyond what the configuration says."""
    return [
        f"  changed since then: {name}: {found.state.layout[key]} → {here[key]}"
        for key, name in (("data", "data-parallel ranks"), ("zero_stage", "ZeRO stage"))
        if here[key] != found.state.layout[key]
    ]


def describe_left_out(found: resume.Resumption, engine: Engine) -> list[str]:
    """What is told of weights in the checkpoint that have no place in the model as it was changed."""
    with checkpoint.open_weights(found.folder) as reader:
        names = sorted(set(reader.parameters) - {name for name, _ in engine.meta_model.named_parameters()})
    return [f"  left out, without a place here: {len(names)} parameters, {names[0]} first"] if names else []
