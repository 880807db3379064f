"""What a row of the table of illegal combinations (:mod:`megatron_iiet.config.combinations`) is, and the rows
that are about a DeepSpeed setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_iiet.config.keys import join_words
from megatron_iiet.config.schema import RunConfig

AUTO = "auto"
STAGE, OFFLOAD = "zero_optimization.stage", "zero_optimization.offload_optimizer.device"


@dataclass(frozen=True)
class Setup:
    """What somebody wants to start."""

    config: RunConfig
    ds: Mapping[str, Any]
    """The DeepSpeed JSON as it was read."""
    world_size: int
    """Number of processes."""
    source: str
    """How messages name the DeepSpeed JSON."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model; meaningful once the number of processes is known to divide."""
        return self.world_size // (self.config.parallel.tensor * self.config.parallel.pipeline)

    def setting(self, key: str) -> Any:
        """The DeepSpeed setting of a dotted name; None if it is absent or "auto". The ZeRO stage is then 0,
        DeepSpeed's default."""
        value: Any = self.ds
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        value = None if value == AUTO else value
        return 0 if key == STAGE and value is None else value

    @property
    def implementation(self) -> str:
        """Whose AdamW is asked for; "auto" of an optimizer that has one implementation."""
        return str(getattr(self.config.optimizer, "implementation", "auto"))

    @property
    def deepspeed_optimizer(self) -> bool:
        """Whether DeepSpeed is to bring its own optimizer."""
        return self.setting("optimizer") is not None or self.implementation == "deepspeed"


@dataclass(frozen=True)
class Rule:
    """One row: what must not come together, why, and what to do instead, as the documentation has it."""

    combination: str
    why: str
    instead: str
    problem: Callable[[Setup], str | None]
    """The whole message for a setup to which the rule applies."""


@dataclass(frozen=True)
class Value:
    """Values of a setting that a rule refuses."""

    description: str
    """Markdown behind the setting's name: ": true", "> 0"."""
    matches: Callable[[Any], bool]


@dataclass(frozen=True)
class With:
    """Under which other circumstance a rule refuses a value."""

    description: str
    """Markdown."""
    holds: Callable[[Setup], bool]
    shown: str
    """The same with this run's numbers, for the message: a format of ``config`` and ``stage``, or empty."""


def refuse(
    keys: str | tuple[str, ...], value: Value, *together: With, why: str, instead: str = "remove it"
) -> Rule:
    """The rule against a value of one DeepSpeed setting, or of any of several, where ``together`` holds."""
    names = (keys,) if isinstance(keys, str) else keys

    def problem(setup: Setup) -> str | None:
        written = {name: setup.setting(name) for name in names}
        key = next((name for name in names if value.matches(written[name])), None)
        if key is None or not all(circumstance.holds(setup) for circumstance in together):
            return None
        what = "set" if isinstance(written[key], (dict, list)) else json.dumps(written[key])
        shown = [c.shown.format(config=setup.config, stage=setup.setting(STAGE)) for c in together if c.shown]
        circumstances = f" with {join_words(shown, 'and')}" if shown else ""
        return f"{key} is {what} in {setup.source}{circumstances}, but {why}; {instead}"

    combination = ", ".join(f"`{name}`" for name in names)
    combination += f" {value.description}" if value.description else ""
    combination += f" with {join_words([c.description for c in together], 'and')}" if together else ""
    return Rule(combination, why, instead, problem)


TRUE = Value("true", lambda value: value is True)
FALSE = Value("false", lambda value: value is False)
PRESENT = Value("", lambda value: value is not None)
POSITIVE = Value("> 0", lambda value: _number(value) and value > 0)
NOT_ONE = Value("other than 1", lambda value: _number(value) and value != 1)
BELOW_ONE = Value("< 1", lambda value: _number(value) and value < 1)
SEVERAL = Value("> 1", lambda value: _number(value) and value > 1)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(*choices: Any, description: str | None = None) -> Value:
    description = join_words(list(map(str, choices))) if description is None else description
    return Value(description, lambda value: type(value) is not bool and value in choices)


_FP32 = ("fp32", "float32", "float", "torch.float32")
_BF16 = ("bf16", "bfloat16", "torch.bfloat16")


def _split(name: str) -> With:
    """Over several ranks along an axis of the grid."""
    key = f"parallel.{name}"
    return With(
        f"`{key}` > 1", lambda setup: getattr(setup.config.parallel, name) > 1, f"{key} = {{config.{key}}}"
    )


PIPELINE, TENSOR = _split("pipeline"), _split("tensor")
ONE_STAGE = With("`parallel.pipeline: 1`", lambda setup: setup.config.parallel.pipeline == 1, "")
BF16, FP16, FP32 = (
    With(
        f"`training.precision: {name}`",
        lambda setup, name=name: setup.config.training.precision == name,  # type: ignore[misc]
        f"training.precision = '{name}'",
    )
    for name in ("bf16", "fp16", "fp32")
)


def _stage(*stages: int) -> With:
    return With(
        f"ZeRO stage {join_words(list(map(str, stages)))}",
        lambda setup: setup.setting(STAGE) in stages,
        "zero_optimization.stage = {stage}",
    )


def _implementation(*names: str) -> With:
    return With(
        f"`optimizer.implementation: {join_words(list(names))}`",
        lambda setup: setup.implementation in names,
        "optimizer.implementation = '{config.optimizer.implementation}'",
    )


DEEPSPEED_RULES = (
    # Layout.
    refuse(
        STAGE,
        _one_of(2, 3),
        PIPELINE,
        why="DeepSpeed's pipeline knows ZeRO stages 0 and 1 only",
        instead="set it to 1, or parallel.pipeline to 1",
    ),
    refuse(
        ("tensor_parallel", "expert_parallel", "zero_optimization.mics_shard_size", "pipeline.stages"),
        PRESENT,
        why="the layout is this trainer's",
        instead="remove it and set parallel.tensor and parallel.pipeline",
    ),
    refuse(
        "sequence_parallel_size",
        SEVERAL,
        why="the layout is this trainer's",
        instead="remove it and set parallel.tensor and parallel.sequence",
    ),
    refuse(
        ("pipeline.pipe_partitioned", "pipeline.grad_partitioned"),
        TRUE,
        TENSOR,
        PIPELINE,
        why="DeepSpeed would cut what stages hand on as if it were the same on all tensor-parallel ranks",
        instead="set it to false",
    ),
    refuse(
        "pipeline.activation_checkpoint_interval",
        POSITIVE,
        PIPELINE,
        why="a stage is one layer to DeepSpeed",
        instead="remove it and set training.recompute",
    ),
    refuse(
        ("wall_clock_breakdown", "flops_profiler.enabled"),
        TRUE,
        PIPELINE,
        why="it starts timers that stop all but the last pipeline stage with an AssertionError",
        instead="set it to false",
    ),
    # Precision.
    refuse(
        STAGE,
        _one_of(0),
        BF16,
        ONE_STAGE,
        why="DeepSpeed then takes one extra optimizer step",
        instead="set it to 1 (it also works on one rank), or training.precision to 'fp32'",
    ),
    refuse(
        STAGE,
        _one_of(0),
        FP16,
        why="DeepSpeed then takes one extra optimizer step, and waits in every one to hear of an overflow",
        instead="set it to 1 (it also works on one rank), or training.precision to 'fp32'",
    ),
    refuse(
        "data_types.grad_accum_dtype",
        _one_of(*_FP32, description="fp32"),
        BF16,
        PIPELINE,
        _stage(0),
        why="DeepSpeed accumulates in bf16 there",
        instead="set zero_optimization.stage to 1",
    ),
    refuse(
        "data_types.grad_accum_dtype",
        Value("other than fp32 and bf16", lambda value: value is not None and value not in _FP32 + _BF16),
        why="gradients are summed in fp32 or bf16",
    ),
    refuse(
        "data_types.grad_accum_dtype",
        _one_of(*_BF16, description="bf16"),
        FP32,
        why="gradients are fp32 then",
    ),
    refuse(
        "data_types.grad_accum_dtype",
        _one_of(*_BF16, description="bf16"),
        FP16,
        why="gradients are fp16 then, and summed in fp32",
    ),
    refuse(
        (
            *("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"),
            "fp16.fp16_master_weights_and_grads",
        ),
        TRUE,
        why="master weights and moments are fp32 here",
    ),
    refuse(
        ("torch_autocast.enabled", "fp16.auto_cast"),
        TRUE,
        why="it would change the arithmetic behind training.precision",
    ),
    refuse(
        "communication_data_type",
        _one_of("fp16"),
        why="gradients overflow in fp16",
        instead="set it to 'fp32' or remove it",
    ),
    # Offloading.
    refuse(
        (OFFLOAD, "zero_optimization.offload_param.device"),
        _one_of("nvme"),
        why="checkpoints cannot read what is swapped out to disk",
        instead="set it to 'cpu'",
    ),
    refuse(
        OFFLOAD,
        _one_of("cpu"),
        _stage(0),
        why="there is nothing to offload without ZeRO",
        instead="set zero_optimization.stage to 1, 2 or 3",
    ),
    refuse(
        "zero_optimization.offload_param.device",
        _one_of("cpu"),
        _stage(0, 1, 2),
        why="only stage 3 offloads parameters",
        instead="set zero_optimization.stage to 3, or remove the section",
    ),
    refuse(
        "zero_force_ds_cpu_optimizer",
        TRUE,
        With(
            "`offload_optimizer` and no `optimizer` section",
            lambda setup: setup.setting(OFFLOAD) == "cpu" and not setup.deepspeed_optimizer,
            "zero_optimization.offload_optimizer and no optimizer section",
        ),
        why="AdamW is then torch's",
        instead="remove it, or add an optimizer section to get DeepSpeed's (compiled at first use)",
    ),
    refuse(
        "zero_optimization.offload_optimizer.ratio", BELOW_ONE, why="it needs DeepSpeed's own CPU optimizer"
    ),
    refuse(
        ("zero_optimization.offload_optimizer.super_offload", "zero_optimization.zenflow"),
        Value("", lambda value: value not in (None, False)),
        why="checkpoints do not know its optimizer",
    ),
    refuse(
        ("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"),
        TRUE,
        why="it is an old name",
        instead='write "offload_optimizer": {"device": "cpu"} or "offload_param": {"device": "cpu"}',
    ),
    # Whose optimizer.
    refuse(
        "optimizer",
        PRESENT,
        _implementation("torch", "apex"),
        why="that section asks for DeepSpeed's AdamW",
        instead="remove it, or set optimizer.implementation to 'auto'",
    ),
    refuse(
        STAGE,
        _one_of(3),
        _implementation("apex"),
        why="apex counts the steps of a group, of which ZeRO-3 steps parts, or none",
        instead="set optimizer.implementation to 'auto', or the stage to 2",
    ),
    refuse(
        OFFLOAD,
        _one_of("cpu"),
        _implementation("apex"),
        why="apex steps on GPUs only",
        instead="remove the section, or set optimizer.implementation to 'auto'",
    ),
    # Training.
    refuse("gradient_allreduce_op", _one_of("sum"), why="the gradient is the mean over data-parallel ranks"),
    refuse("managed_gradient_accumulation", FALSE, why="the optimizer would step after every micro-batch"),
    refuse("prescale_gradients", TRUE, why="ZeRO with reduce_scatter does not scale before it sums"),
    refuse(
        "gradient_predivide_factor", NOT_ONE, why="ZeRO with reduce_scatter does not divide before it sums"
    ),
    refuse("zero_optimization.compute_grad_norm", FALSE, why="the gradient norm is clipped and logged"),
    refuse(
        ("activation_checkpointing.partition_activations", "activation_checkpointing.cpu_checkpointing"),
        TRUE,
        why="DeepSpeed's activation checkpointing is not used",
        instead="remove it and set training.recompute",
    ),
    refuse("data_efficiency.enabled", TRUE, why="the order of the data is this trainer's"),
    refuse("compile.deepcompile", TRUE, why="the engine is not compiled here"),
    refuse(
        ("elasticity", "amp", "sparse_gradients", "curriculum_learning", "progressive_layer_drop"),
        PRESENT,
        why="DeepSpeed 0.19 does not have it any more",
    ),
)
"""Those about a DeepSpeed setting (version 0.19.8)."""
