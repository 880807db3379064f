"""DeepSpeed's engine with the corrections that every engine here needs, started quietly."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron_iiet.config import RunConfig
from megatron_iiet.config.deepspeed import offloads_optimizer
from megatron_iiet.config.loss_scaling import loss_scaling
from megatron_iiet.parallel import Group, ParallelContext
from megatron_iiet.parallel.tensor import shard_of
from megatron_iiet.training.engine.deepspeed_internals import (
    PLAIN,
    DeepSpeedConfig,
    DeepSpeedEngine,
    check_classes,
    check_engine,
    check_own_adam,
    kind_of,
    lasting_gradients,
    masters,
    norm_of,
    scale_loss,
    without_scaling,
    without_waits,
)
from megatron_iiet.training.engine.gate import Gate
from megatron_iiet.training.engine.loss_scale import LossScale
from megatron_iiet.training.engine.master_parts import master_parts
from megatron_iiet.training.optimizers import prepare_optimizer


class CorrectedEngine(DeepSpeedEngine):
    """DeepSpeed's engine with fp32 merge coefficients and a right gradient norm in every layout.

    Parameters marked ``keep_fp32`` are not cast to 16 bits. ZeRO-3 packs all parameters into one buffer of
    one type and can't keep them apart: there the working copy of a marked parameter is of the type of the
    rest (its master copy is fp32 in every stage).

    Without ZeRO in fp32, DeepSpeed reports no norm, and with pipeline stages clips by a norm that leaves the
    later stages out; here the norm is over the whole model.
    """

    context: ParallelContext
    offloaded: bool
    """Whether the optimizer is in another memory than the model."""
    moments: Mapping[nn.Parameter, tuple[str, ...]]
    """What the optimizer keeps of each parameter."""
    gate: Gate
    """Decides whether the optimizer steps; begun before every one."""
    own_scale: LossScale | None
    """What the loss is multiplied by in fp16."""

    @classmethod
    def start(
        cls,
        module: nn.Module,
        trained: nn.Module,
        config: RunConfig,
        ds_config: dict[str, Any],
        context: ParallelContext,
        mpu: Any,
    ) -> Self:
        """Wrap ``module``, of which the part ``trained`` is; with our optimizer unless the DeepSpeed JSON has
        one of its own. ``mpu`` is the grid in DeepSpeed's words.

        Raises:
            ConfigError: this DeepSpeed lacks something that we rely on.
        """
        check_classes()
        check_own_adam(ds_config)
        prepared = prepare_optimizer(trained, config.optimizer)
        ours = "optimizer" not in ds_config
        theirs = without_scaling(ds_config)
        with redirect_stdout(io.StringIO()):  # it prints a memory report a parameter group
            engine = cls(
                args=None,
                model=module,
                optimizer=prepared.build(prepared.groups) if ours else None,
                model_parameters=None if ours else prepared.groups,
                mpu=mpu,
                config=theirs,
                config_class=DeepSpeedConfig(theirs, mpu),
                dist_init_required=False,
            )
        check_engine(engine, trained)
        engine.context = context
        engine.offloaded = offloads_optimizer(ds_config)
        engine.moments = prepared.moments
        if ours:
            parts = master_parts(engine, trained.parameters())
            prepared.connect(engine.basic_optimizer, masters(engine), parts, context)
        engine.own_scale = None
        if config.training.precision == "fp16":
            settings = loss_scaling(ds_config)
            engine.own_scale = LossScale(settings, context.device, offloaded=engine.offloaded)
            scale_loss(engine, engine.own_scale.at_optimizer)
        engine.gate = Gate(config.guards, context.world, context.device, engine.own_scale)
        if context.tensor.rank:
            engine.gate.watch(p for p in trained.parameters() if p.requires_grad and shard_of(p) is None)
        engine.gate.guard(engine.basic_optimizer, partial(norm_of, engine), offloaded=engine.offloaded)
        return engine

    def forget_gradients(self) -> None:
        """Start from zero gradients, between steps. ZeRO-3 and every offloaded optimizer would otherwise step
        again with the last gradient of a parameter that gets none any more."""
        for buffer in lasting_gradients(self, offloaded=self.offloaded):
            buffer.zero_()

    def _cast_module_mixed_precision(
        self, param_dtype: torch.dtype | None, *args: Any, **kwargs: Any
    ) -> None:
        kept = {}
        if self.zero_optimization_stage() < 3:
            kept = {p: p.data for p in self.module.parameters() if getattr(p, "keep_fp32", False)}
        super()._cast_module_mixed_precision(param_dtype, *args, **kwargs)
        for parameter, data in kept.items():
            parameter.data = data.to(self.device)

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        if kind_of(self) is PLAIN:
            self._global_grad_norm = global_norm(self.module, self.context)
        with without_waits(self):
            super()._take_model_step(*args, **kwargs)
        self.gate.decide(norm_of(self))  # where DeepSpeed did not ask the optimizer
        self.gate.end()

    def clip_fp32_gradients(self) -> None:
        torch.nn.utils.clip_grads_with_norm_(
            self.module.parameters(), self.gradient_clipping(), self._global_grad_norm
        )


def global_norm(module: nn.Module, context: ParallelContext) -> Tensor:
    """Euclidean norm of the gradients of the whole model, each parameter once; the same on every rank."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and is_owner(p, context.tensor)]
    square = torch.nn.utils.get_total_norm(gradients).to(context.device).square()
    context.tensor.all_reduce(square)
    context.pipeline.all_reduce(square)
    return square.sqrt()


def is_owner(parameter: Tensor, tensor: Group) -> bool:
    """Whether this rank answers for a parameter that others of its replica may hold too: tensor rank 0 for a
    replicated one, the first stage for a tied embedding."""
    tied_copy = getattr(parameter, "ds_pipe_replicated", False)
    return not tied_copy and (tensor.rank == 0 or shard_of(parameter) is not None)


def model_parallel_unit(context: ParallelContext) -> Any:
    """The grid as DeepSpeed's ``mpu`` arguments want it, an object with nine functions
    ``get_AXIS_parallel_{group,rank,world_size}``; None where all ranks are replicas."""
    if context.tensor.size == 1:
        return None
    unit = SimpleNamespace()
    axes = {"model": context.tensor, "tensor_model": context.tensor, "data": context.data}
    for axis, group in axes.items():
        for what, value in (("group", group.handle), ("rank", group.rank), ("world_size", group.size)):
            setattr(unit, f"get_{axis}_parallel_{what}", lambda value=value: value)
    return unit
