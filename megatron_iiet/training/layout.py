"""How a run is laid out over its processes, and what that costs, in words."""

from __future__ import annotations

from megatron_iiet.config import RunConfig
from megatron_iiet.models.pipeline import entries_crossing
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine import Engine

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def layout_of(context: ParallelContext, zero_stage: int) -> dict[str, int]:
    """Sizes of the grid's axes and the ZeRO stage, for a checkpoint's record."""
    return {
        "tensor": context.tensor.size,
        "pipeline": context.pipeline.size,
        "data": context.data.size,
        "zero_stage": zero_stage,
    }


def describe_layout(config: RunConfig, engine: Engine) -> str:
    """The grid, and with pipeline stages their layers, the bubble and what crosses their boundaries."""
    context = engine.context
    sequence = ", sequence parallel" if context.tensor_parallel.cuts_sequence else ""
    grid = (
        f"layout: tensor {context.tensor.size} x pipeline {context.pipeline.size} x "
        f"data {context.data.size}, ZeRO stage {engine.zero_stage}{sequence}"
    )
    if context.pipeline.size == 1:
        return grid
    plan, micro_batches = engine.plan, engine.accumulation
    stages = ", ".join(
        f"{part.start}-{part.stop - 1} ({cost:.0%})"
        for part, cost in zip(plan.stages, plan.costs, strict=True)
    )
    return (
        f"{grid}\npipeline: layers {stages} of the work; bubble {plan.bubble(micro_batches):.0%} of the time "
        f"with {micro_batches} micro-batches a step\npayload: {payloads(config, engine)}"
    )


def payloads(config: RunConfig, engine: Engine) -> str:
    """What crosses each boundary a micro-batch, and of how many micro-batches the receiving stage has
    buffers at a time (DeepSpeed's 1F1B)."""
    stages, context = engine.plan.stages, engine.context
    part = config.data.sequence_length
    if context.tensor_parallel.cuts_sequence:
        part //= context.tensor.size
    tensor = (
        config.training.micro_batch_size * part * config.model.hidden_size * _BYTES[config.training.precision]
    )
    said = []
    for number, stage in enumerate(stages[1:], start=1):
        entries = len(entries_crossing(engine.meta_model, stage.start))
        buffers = max(2, min(len(stages) - number, engine.accumulation))
        mib = (1 + entries) * tensor / 2**20
        said.append(
            f"into stage {number} the stream and {entries} history entries, {mib:.1f} MiB a micro-batch "
            f"({mib * buffers:.1f} MiB in {buffers} buffers)"
        )
    return "; ".join(said)
