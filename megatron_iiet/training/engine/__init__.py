"""The one seam to DeepSpeed: nothing outside this folder imports it."""

from __future__ import annotations

import warnings

from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine.base import Engine, NotFinite
from megatron_iiet.training.engine.deepspeed_internals import (
    allow_fp16_on_cpus,
    forbid_shared_memory_collective,
)
from megatron_iiet.training.engine.pipelined import PipelinedEngine
from megatron_iiet.training.engine.plain import PlainEngine
from megatron_iiet.training.engine.results import StepResult, Verdict

__all__ = ["Engine", "NotFinite", "StepResult", "Verdict", "engine_class"]

forbid_shared_memory_collective()
allow_fp16_on_cpus()
# DeepSpeed calls a collective by the name it had before torch 2.13; users cannot help it.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def engine_class(context: ParallelContext) -> type[Engine]:
    """The engine for this grid; its arguments are those of :class:`Engine`."""
    return PipelinedEngine if context.pipeline.size > 1 else PlainEngine
