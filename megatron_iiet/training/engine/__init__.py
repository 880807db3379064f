"""The one seam to DeepSpeed: nothing outside this folder imports it."""

from __future__ import annotations

import warnings
from typing import Any

from megatron_iiet.config import RunConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage.source import Source
from megatron_iiet.training.engine.base import Engine, StepResult
from megatron_iiet.training.engine.deepspeed_internals import forbid_shared_memory_collective
from megatron_iiet.training.engine.pipelined import PipelinedEngine
from megatron_iiet.training.engine.plain import PlainEngine
from megatron_iiet.training.warm_start import WarmStart

__all__ = ["Engine", "StepResult", "build_engine"]

forbid_shared_memory_collective()
# DeepSpeed calls a collective by the name it had before torch 2.13; users cannot help it.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def build_engine(
    config: RunConfig,
    ds_config: dict[str, Any],
    context: ParallelContext,
    backend: str,
    *,
    initialise: bool = True,
    warm: WarmStart | None = None,
    teacher: Source | None = None,
) -> Engine:
    """The engine of this rank's part of the model.

    ``ds_config`` is the reconciled DeepSpeed JSON (no "auto" left), ``backend`` that of the merges. Without
    ``initialise`` the matrices hold whatever they hold: for a checkpoint that is about to be loaded.
    ``warm``: which parameters start with the values of another model;
    ``teacher``: the model to learn from.
    """
    kind = PipelinedEngine if context.pipeline.size > 1 else PlainEngine
    return kind(config, ds_config, context, backend, initialise=initialise, warm=warm, teacher=teacher)
