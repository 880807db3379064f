"""The table of illegal combinations: every row has a message, and what is legal passes."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, RunConfig, check_combination, validate
from megatron_iiet.config.combinations import (
    COMBINATIONS,
    LAYOUT_RULES,
    gradient_accumulation_steps,
    tensor_sizes,
)
from megatron_iiet.config.rules import Setup
from tests.config.test_config_validation import config_with

Z1: dict[str, Any] = {"zero_optimization": {"stage": 1}}
P2 = {"parallel__pipeline": 2}
T2P2 = {"parallel__tensor": 2, "parallel__pipeline": 2}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def offload(stage: int, **settings: Any) -> dict[str, Any]:
    return zero(stage, offload_optimizer={"device": "cpu", **settings})


ERRORS: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    # --- layout: the default model has 4 heads, width 1408, 12 layers, V = 32000 ---
    (
        {"parallel__tensor": 3},
        Z1,
        3,
        "parallel.tensor is 3, but does not divide model.num_attention_heads = 4, model.num_key_value_heads = 4, model.ffn_hidden_size = 1408, the padded vocabulary = 32000; set it to 2 or 4",
    ),
    (
        {"parallel__tensor": 4, "model__num_key_value_heads": 2},
        Z1,
        4,
        "parallel.tensor is 4, but does not divide model.num_key_value_heads = 2; set it to 2",
    ),
    (
        {"parallel__tensor": 4, "model__vocab_size": 1001, "model__vocab_multiple": 2},
        Z1,
        4,
        "parallel.tensor is 4, but does not divide the padded vocabulary = 1002; set it to 2",
    ),
    (
        {"parallel__pipeline": 16},
        Z1,
        16,
        "parallel.pipeline is 16, but model.num_layers is 12 and every stage needs a layer; set it to 12 or less",
    ),
    (
        {"parallel__tensor": 4, "parallel__sequence": True, "data__sequence_length": 2046},
        Z1,
        4,
        "data.sequence_length is 2046, but parallel.sequence cuts it into parallel.tensor = 4 equal parts; set it to 2044 or 2048, or parallel.sequence to false",
    ),
    (
        {"guards__replicas": 10},
        zero(3),
        4,
        "guards.replicas is 10, but with ZeRO stage 3 (ds.json) every rank holds a part of the parameters and there is nothing to compare; set it to 0, or zero_optimization.stage to 2",
    ),
    (
        {"training__compile": "layer"},
        zero(3),
        4,
        "training.compile is layer, but with ZeRO stage 3 (ds.json) the parameters of F are gathered within it, which a graph cannot do; set it to off, or zero_optimization.stage to 2",
    ),
    (
        {"training__fp8": "rowwise", "training__precision": "fp16"},
        Z1,
        1,
        "training.fp8 is rowwise, but training.precision is fp16 and fp8 is rounded from bf16; set the one to off, or the other to bf16",
    ),
    (
        {"training__fp8": "tensorwise", "training__compile": "layer"},
        Z1,
        1,
        "training.fp8 is tensorwise, but training.compile is layer, which was not tried with it; set one of them to off",
    ),
    (
        {
            "training__fp8": "tensorwise",
            "model__ffn_hidden_size": 1416,
            "training__micro_batch_size": 1,
            "data__sequence_length": 1000,
        },
        Z1,
        1,
        "training.fp8 is tensorwise, but model.ffn_hidden_size / parallel.tensor is 1416 and training.micro_batch_size x data.sequence_length is 1000, and GPUs multiply fp8 in multiples of 16; change it, or set training.fp8 to off",
    ),
    # --- number of processes ---
    (
        {"parallel__tensor": 4, "parallel__pipeline": 2},
        Z1,
        12,
        "the number of processes is 12, but must be a multiple of parallel.tensor x parallel.pipeline, 4 x 2 = 8; start 8 or 16, set parallel.tensor to 2 or set parallel.pipeline to 1 or 3",
    ),
    (
        T2P2,
        Z1,
        3,
        "the number of processes is 3, but must be a multiple of parallel.tensor x parallel.pipeline, 2 x 2 = 4; start 4",
    ),
    (
        T2P2,
        Z1,
        12,
        "training.global_batch_size is 128, but must be a multiple of training.micro_batch_size times the data-parallel ranks, 8 x 3 = 24; set it to 120 or 144, or start 8 or 16 ranks",
    ),
    (
        T2P2,
        Z1,
        20,
        "training.global_batch_size is 128, but must be a multiple of training.micro_batch_size times the data-parallel ranks, 8 x 5 = 40; set it to 120 or 160, or start 16 or 32 ranks",
    ),
    (
        {"parallel__pipeline": 3, "model__num_layers": 4},
        Z1,
        4,
        "the number of processes is 4, but must be a multiple of parallel.tensor x parallel.pipeline, 1 x 3 = 3; start 3 or 6 or set parallel.pipeline to 2 or 4",
    ),
    # --- DeepSpeed: layout ---
    (
        P2,
        zero(2),
        2,
        "zero_optimization.stage is 2 in ds.json with parallel.pipeline = 2, but DeepSpeed's pipeline knows ZeRO stages 0 and 1 only; set it to 1, or parallel.pipeline to 1",
    ),
    (
        {},
        Z1 | {"tensor_parallel": {"autotp_size": 2}},
        2,
        "tensor_parallel is set in ds.json, but the layout is this trainer's; remove it and set parallel.tensor and parallel.pipeline",
    ),
    (
        {},
        zero(3, mics_shard_size=2),
        2,
        "zero_optimization.mics_shard_size is 2 in ds.json, but the layout is this trainer's; remove it and set parallel.tensor and parallel.pipeline",
    ),
    (
        {},
        Z1 | {"pipeline": {"stages": 4}},
        4,
        "pipeline.stages is 4 in ds.json, but the layout is this trainer's; remove it and set parallel.tensor and parallel.pipeline",
    ),
    (
        {},
        Z1 | {"sequence_parallel_size": 2},
        2,
        "sequence_parallel_size is 2 in ds.json, but the layout is this trainer's; remove it and set parallel.tensor and parallel.sequence",
    ),
    (
        T2P2,
        Z1 | {"pipeline": {"grad_partitioned": True}},
        4,
        "pipeline.grad_partitioned is true in ds.json with parallel.tensor = 2 and parallel.pipeline = 2, but DeepSpeed would cut what stages hand on as if it were the same on all tensor-parallel ranks; set it to false",
    ),
    (
        P2,
        Z1 | {"pipeline": {"activation_checkpoint_interval": 1}},
        2,
        "pipeline.activation_checkpoint_interval is 1 in ds.json with parallel.pipeline = 2, but a stage is one layer to DeepSpeed; remove it and set training.recompute",
    ),
    (
        P2,
        Z1 | {"flops_profiler": {"enabled": True}},
        2,
        "flops_profiler.enabled is true in ds.json with parallel.pipeline = 2, but it starts timers that stop all but the last pipeline stage with an AssertionError; set it to false",
    ),
    (
        P2,
        Z1 | {"wall_clock_breakdown": True},
        2,
        "wall_clock_breakdown is true in ds.json with parallel.pipeline = 2, but it starts timers that stop all but the last pipeline stage with an AssertionError; set it to false",
    ),
    # --- DeepSpeed: precision ---
    (
        {},
        {},
        2,
        "zero_optimization.stage is 0 in ds.json with training.precision = 'bf16', but DeepSpeed then takes one extra optimizer step; set it to 1 (it also works on one rank), or training.precision to 'fp32'",
    ),
    (
        P2 | {"training__precision": "fp16"},
        {},
        2,
        "zero_optimization.stage is 0 in ds.json with training.precision = 'fp16', but DeepSpeed then takes one extra optimizer step, and waits in every one to hear of an overflow; set it to 1 (it also works on one rank), or training.precision to 'fp32'",
    ),
    (
        {"training__precision": "fp16"},
        Z1 | {"data_types": {"grad_accum_dtype": "bf16"}},
        2,
        "data_types.grad_accum_dtype is \"bf16\" in ds.json with training.precision = 'fp16', but gradients are fp16 then, and summed in fp32; remove it",
    ),
    (
        {"training__precision": "fp16"},
        Z1 | {"fp16": {"auto_cast": True}},
        2,
        "fp16.auto_cast is true in ds.json, but it would change the arithmetic behind training.precision; remove it",
    ),
    (
        P2,
        zero(0) | {"data_types": {"grad_accum_dtype": "fp32"}},
        2,
        "data_types.grad_accum_dtype is \"fp32\" in ds.json with training.precision = 'bf16', parallel.pipeline = 2 and zero_optimization.stage = 0, but DeepSpeed accumulates in bf16 there; set zero_optimization.stage to 1",
    ),
    (
        {},
        Z1 | {"data_types": {"grad_accum_dtype": "fp16"}},
        2,
        'data_types.grad_accum_dtype is "fp16" in ds.json, but gradients are summed in fp32 or bf16; remove it',
    ),
    (
        {"training__precision": "fp32"},
        Z1 | {"data_types": {"grad_accum_dtype": "bf16"}},
        2,
        "data_types.grad_accum_dtype is \"bf16\" in ds.json with training.precision = 'fp32', but gradients are fp32 then; remove it",
    ),
    (
        {},
        Z1 | {"bf16": {"enabled": "auto", "bf16_optimizer_states": True}},
        2,
        "bf16.bf16_optimizer_states is true in ds.json, but master weights and moments are fp32 here; remove it",
    ),
    (
        {},
        Z1 | {"torch_autocast": {"enabled": True}},
        2,
        "torch_autocast.enabled is true in ds.json, but it would change the arithmetic behind training.precision; remove it",
    ),
    (
        {},
        Z1 | {"communication_data_type": "fp16"},
        2,
        "communication_data_type is \"fp16\" in ds.json, but gradients overflow in fp16; set it to 'fp32' or remove it",
    ),
    # --- DeepSpeed: offloading ---
    (
        {},
        offload(1, device="nvme"),
        2,
        "zero_optimization.offload_optimizer.device is \"nvme\" in ds.json, but checkpoints cannot read what is swapped out to disk; set it to 'cpu'",
    ),
    (
        {"training__precision": "fp32"},
        offload(0),
        2,
        'zero_optimization.offload_optimizer.device is "cpu" in ds.json with zero_optimization.stage = 0, but there is nothing to offload without ZeRO; set zero_optimization.stage to 1, 2 or 3',
    ),
    (
        {},
        zero(2, offload_param={"device": "cpu"}),
        2,
        'zero_optimization.offload_param.device is "cpu" in ds.json with zero_optimization.stage = 2, but only stage 3 offloads parameters; set zero_optimization.stage to 3, or remove the section',
    ),
    (
        {},
        offload(2) | {"zero_force_ds_cpu_optimizer": True},
        2,
        "zero_force_ds_cpu_optimizer is true in ds.json with zero_optimization.offload_optimizer and no optimizer section, but AdamW is then torch's; remove it, or add an optimizer section to get DeepSpeed's (compiled at first use)",
    ),
    # --- DeepSpeed: whose optimizer ---
    (
        {"optimizer__implementation": "torch"},
        Z1 | {"optimizer": {"type": "AdamW"}},
        2,
        "optimizer is set in ds.json with optimizer.implementation = 'torch', but that section asks for DeepSpeed's AdamW; remove it, or set optimizer.implementation to 'auto'",
    ),
    (
        {"optimizer__implementation": "apex"},
        zero(3),
        2,
        "zero_optimization.stage is 3 in ds.json with optimizer.implementation = 'apex', but apex counts the steps of a group, of which ZeRO-3 steps parts, or none; set optimizer.implementation to 'auto', or the stage to 2",
    ),
    (
        {"optimizer__implementation": "apex"},
        offload(2),
        2,
        "zero_optimization.offload_optimizer.device is \"cpu\" in ds.json with optimizer.implementation = 'apex', but apex steps on GPUs only; remove the section, or set optimizer.implementation to 'auto'",
    ),
    (
        {},
        offload(3, ratio=0.5),
        2,
        "zero_optimization.offload_optimizer.ratio is 0.5 in ds.json, but it needs DeepSpeed's own CPU optimizer; remove it",
    ),
    (
        {},
        offload(2) | zero(2, zenflow={"topk_ratio": 0.1}),
        2,
        "zero_optimization.zenflow is set in ds.json, but checkpoints do not know its optimizer; remove it",
    ),
    (
        {},
        zero(2, cpu_offload=True),
        2,
        'zero_optimization.cpu_offload is true in ds.json, but it is an old name; write "offload_optimizer": {"device": "cpu"} or "offload_param": {"device": "cpu"}',
    ),
    # --- DeepSpeed: training ---
    (
        {},
        Z1 | {"gradient_allreduce_op": "sum"},
        2,
        'gradient_allreduce_op is "sum" in ds.json, but the gradient is the mean over data-parallel ranks; remove it',
    ),
    (
        {},
        Z1 | {"managed_gradient_accumulation": False},
        2,
        "managed_gradient_accumulation is false in ds.json, but the optimizer would step after every micro-batch; remove it",
    ),
    (
        {},
        Z1 | {"prescale_gradients": True},
        2,
        "prescale_gradients is true in ds.json, but ZeRO with reduce_scatter does not scale before it sums; remove it",
    ),
    (
        {},
        Z1 | {"gradient_predivide_factor": 2.0},
        2,
        "gradient_predivide_factor is 2.0 in ds.json, but ZeRO with reduce_scatter does not divide before it sums; remove it",
    ),
    (
        {},
        zero(2, compute_grad_norm=False),
        2,
        "zero_optimization.compute_grad_norm is false in ds.json, but the gradient norm is clipped and logged; remove it",
    ),
    (
        {},
        Z1 | {"activation_checkpointing": {"partition_activations": True}},
        2,
        "activation_checkpointing.partition_activations is true in ds.json, but DeepSpeed's activation checkpointing is not used; remove it and set training.recompute",
    ),
    (
        {},
        Z1 | {"data_efficiency": {"enabled": True}},
        2,
        "data_efficiency.enabled is true in ds.json, but the order of the data is this trainer's; remove it",
    ),
    (
        P2,
        Z1 | {"compile": {"deepcompile": True}},
        2,
        "compile.deepcompile is true in ds.json, but the engine is not compiled here; remove it",
    ),
    (
        {},
        Z1 | {"elasticity": {"enabled": True}},
        2,
        "elasticity is set in ds.json, but DeepSpeed 0.19 does not have it any more; remove it",
    ),
]


@pytest.mark.parametrize(("changes", "ds", "world", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(changes: dict[str, Any], ds: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_combination(config_with(**changes), ds, world, "ds.json")
    assert str(caught.value) == message


def test_every_row_is_tested() -> None:
    first = set()
    for changes, ds, world, _ in ERRORS:
        setup = Setup(config_with(**changes), ds, world, "ds.json")
        first.add(next(rule.combination for rule in COMBINATIONS if rule.problem(setup)))
    assert first == {rule.combination for rule in COMBINATIONS}


@pytest.mark.parametrize("case", ERRORS[:5], ids=lambda case: str(case[0])[:40])
def test_layout_is_validated_without_a_number_of_processes(
    case: tuple[dict[str, Any], Any, int, str],
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config_with(**case[0]))
    assert str(caught.value) == case[3]


@pytest.mark.parametrize(
    ("changes", "ds", "world", "data_parallel"),
    [
        ({}, Z1, 1, 1),
        ({}, Z1, 4, 4),
        ({}, zero(3), 16, 16),
        ({"parallel__tensor": 4}, zero(3), 8, 2),
        ({"parallel__tensor": 2, "parallel__pipeline": 3}, Z1, 12, 2),
        ({"parallel__pipeline": 12}, Z1, 12, 1),
        (P2, zero(0), 2, 1),
        (P2 | {"training__precision": "fp32"}, {}, 4, 2),
        ({"training__precision": "fp32"}, {}, 2, 2),
        ({"parallel__sequence": True, "data__sequence_length": 2047}, Z1, 2, 2),  # no effect without tensor
        ({"parallel__tensor": 2, "parallel__sequence": True}, Z1, 2, 1),
        ({"parallel__tensor": 2, "data__sequence_length": 2047}, Z1, 2, 1),  # nothing cuts it
        ({"parallel__pipeline": 2}, Z1 | {"pipeline": {"activation_checkpoint_interval": 0}}, 2, 1),
        ({"parallel__tensor": 2}, Z1 | {"pipeline": {"pipe_partitioned": True}}, 2, 1),
        (P2, Z1 | {"pipeline": {"pipe_partitioned": True}}, 2, 1),
        ({}, Z1 | {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}, 1, 1),
        ({}, zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}), 2, 2),
        ({"parallel__tensor": 2}, offload(1), 2, 1),
        (P2, offload(1, device="none"), 2, 1),
        (P2 | {"model__tie_embeddings": False}, offload(1), 2, 1),
        (P2 | {"training__precision": "fp32"}, offload(1), 2, 1),
        ({}, offload(2) | {"zero_force_ds_cpu_optimizer": True, "optimizer": {"type": "AdamW"}}, 2, 2),
        (
            {"optimizer__implementation": "deepspeed"},
            offload(2) | {"zero_force_ds_cpu_optimizer": True, "optimizer": {"params": {"torch_adam": True}}},
            2,
            2,
        ),
        (
            {"optimizer__implementation": "deepspeed"},
            offload(2) | {"zero_force_ds_cpu_optimizer": True},
            2,
            2,
        ),
        ({}, Z1 | {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}, 2, 2),
        ({}, Z1 | {"gradient_predivide_factor": 1, "sequence_parallel_size": 1}, 2, 2),
        # "auto" is as good as absent, and what is no object is left to reconcile()
        (P2, Z1 | {"wall_clock_breakdown": "auto", "pipeline": {"stages": "auto"}}, 2, 1),
        ({}, {"zero_optimization": {"stage": "x"}, "bf16": 3}, 2, 2),
    ],
    ids=str,
)
def test_allowed(changes: dict[str, Any], ds: dict[str, Any], world: int, data_parallel: int) -> None:
    config = config_with(**changes)
    assert check_combination(config, ds, world, "ds.json") == data_parallel
    assert gradient_accumulation_steps(config, data_parallel) == 128 // 8 // data_parallel


def test_tensor_sizes() -> None:
    assert tensor_sizes(RunConfig()) == [1, 2, 4]
    assert tensor_sizes(config_with(model__num_attention_heads=32, model__hidden_size=2048)) == [
        1,
        2,
        4,
        8,
        16,
        32,
    ]
    assert tensor_sizes(config_with(model__num_key_value_heads=1)) == [1]


def test_padded_vocabulary() -> None:
    assert RunConfig().model.padded_vocab_size == 32000
    assert config_with(model__vocab_size=32001).model.padded_vocab_size == 32128
    assert config_with(model__vocab_size=97, model__vocab_multiple=1).model.padded_vocab_size == 97


def table_markdown() -> str:
    """The table as Markdown, for the documentation."""
    lines = ["| not together | because | instead |", "|---|---|---|"]
    lines += [f"| {rule.combination} | {rule.why} | {rule.instead} |" for rule in COMBINATIONS]
    return "\n".join(lines) + "\n"


def test_table_has_every_row() -> None:
    table = table_markdown().splitlines()
    assert table[0] == "| not together | because | instead |"
    assert len(table) == len(COMBINATIONS) + 2
    assert all(line.count("|") == 4 for line in table)
    assert (
        "| `wall_clock_breakdown`, `flops_profiler.enabled` true with `parallel.pipeline` > 1 |"
        in table_markdown()
    )
    assert set(LAYOUT_RULES) < set(COMBINATIONS)


def test_the_documentation_has_the_table() -> None:
    """After a change of the table: paste what :func:`table_markdown` returns."""
    docs = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
    assert table_markdown() in docs.read_text()
