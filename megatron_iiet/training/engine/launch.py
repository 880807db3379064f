"""Making a DeepSpeed engine quietly."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any, TypeVar

from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from megatron_iiet.config import RunConfig
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine.precision import CorrectedEngine
from megatron_iiet.training.optimizer import build_optimizer, parameter_groups

AnyEngine = TypeVar("AnyEngine", bound=CorrectedEngine)


def deepspeed_engine(
    kind: type[AnyEngine],
    module: nn.Module,
    model: Transformer,
    config: RunConfig,
    ds_config: dict[str, Any],
    config_class: DeepSpeedConfig,
    context: ParallelContext,
    mpu: Any,
) -> AnyEngine:
    """An engine of class ``kind`` around ``module``, which holds ``model``; with our AdamW unless the
    DeepSpeed JSON has an optimizer of its own."""
    own_optimizer = "optimizer" not in ds_config
    with redirect_stdout(io.StringIO()):  # it prints a memory report a parameter group
        engine = kind(
            args=None,
            model=module,
            optimizer=build_optimizer(model, config.optimizer) if own_optimizer else None,
            model_parameters=None if own_optimizer else parameter_groups(model, config.optimizer),
            mpu=mpu,
            config=ds_config,
            config_class=config_class,
            dist_init_required=False,
        )
    engine.context = context
    return engine
