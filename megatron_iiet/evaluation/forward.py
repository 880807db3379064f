"""A trained model without its training: forward passes on any grid of processes, of which each reads the
weights that it holds. Pipeline stages send their packed streams from point to point."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iiet.config import RunConfig, validate
from megatron_iiet.config.combinations import check_combination
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.data.loader.inputs import Inputs
from megatron_iiet.models.diagnostics import InfluenceSums, observe_influence
from megatron_iiet.models.pipeline import PipelineStage, stage_plan
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.vocabulary import IGNORED
from megatron_iiet.storage.source import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forward_config(
    config: RunConfig,
    parallel: ParallelConfig,
    precision: Literal["fp32", "bf16"],
    *,
    length: int,
    micro_batch_size: int,
    world_size: int,
    tokenizer: str,
) -> RunConfig:
    """A trained model's configuration with the grid, batches and precision of forward passes.

    Raises:
        ConfigError: they do not fit the model or the number of processes.
    """
    config = deepcopy(config)
    config.parallel = parallel
    config.data.sequence_length = length
    config.data.tokenizer = tokenizer
    config.training.recompute = config.training.fp8 = "off"
    config.training.precision = "fp32"  # what training in bf16 must not be combined with does not matter here
    grid = max(1, parallel.tensor * parallel.pipeline)
    config.training.micro_batch_size = micro_batch_size
    config.training.global_batch_size = micro_batch_size * max(1, world_size // grid)
    validate(config)
    check_combination(config, {"zero_optimization": {"stage": 0}}, world_size, "the tool")
    config.training.precision = precision
    return config


class ForwardModel:
    """This rank's part of a model, in evaluation mode."""

    def __init__(self, source: Source, config: RunConfig, context: ParallelContext, backend: str) -> None:
        """Load the weights of ``source``; ``config``: its own, with this grid, sequence length, precision."""
        self.config = config
        self.context = context
        self.dtype = DTYPES[config.training.precision]
        self.meta_model = Transformer.on_meta(config)
        stages = stage_plan(config, self.meta_model).stages
        with context.device:
            self.model = Transformer(
                config,
                backend=backend,
                parallel=context.tensor_parallel,
                layers=stages[context.pipeline.rank],
            ).eval()
        for name, parameter in self.model.named_parameters():
            source.fill_parameter(name, parameter, context.tensor)
            if not getattr(parameter, "keep_fp32", False):
                parameter.data = parameter.data.to(self.dtype)
        self._stage = PipelineStage(self.model, config.data.sequence_length)
        self._stage.resize(self.meta_model)

    def set_iterations(self, iterations: list[int]) -> None:
        """Change the corrector iterations of all layers, see :meth:`Transformer.set_iterations`."""
        for model in (self.model, self.meta_model):
            model.set_iterations(iterations)
        self._stage.resize(self.meta_model)

    @torch.no_grad()
    def run(self, inputs: Inputs, *, with_loss: bool) -> Tensor | None:
        """One micro-batch through this rank's stage. ``with_loss``: the last stage returns the sum of the
        cross-entropy in nats over the targets that count."""
        y_BTD, history = self._stage.unpack(inputs.tokens if self.model.is_first else self._receive(inputs))
        y_BTD = self.model.integrate(y_BTD, history, inputs.tokens.shape[1], inputs.positions)
        if not self.model.is_last:
            pipeline = self.context.pipeline
            packed = self._stage.pack(y_BTD, history)
            dist.send(packed, pipeline.ranks[pipeline.rank + 1], group=pipeline.handle)
        elif with_loss:
            return self.model.loss(y_BTD, inputs.targets, 1.0)
        return None

    def observe(self, inputs: Inputs, *, with_loss: bool = False) -> tuple[InfluenceSums, Tensor | None]:
        """:meth:`run` with the influence of everything that this rank sees of it."""
        with observe_influence(self.model, self.counted(inputs)) as sums:
            loss = self.run(inputs, with_loss=with_loss)
        return sums, loss

    def counted(self, inputs: Inputs) -> Tensor:
        """Which tokens count, bool [B, T], of those whose streams are on this rank: those with a target."""
        counted_BT = inputs.targets != IGNORED
        if not self.context.tensor_parallel.cuts_sequence:
            return counted_BT
        return counted_BT.chunk(self.context.tensor.size, 1)[self.context.tensor.rank]

    def mean_loss(self, batches: Iterable[Inputs]) -> float:
        """Cross-entropy in nats per token that counts, over the batches of all replicas; on every rank."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for inputs in batches:
            loss = self.run(inputs, with_loss=True)
            if loss is not None:
                sums += torch.stack((loss, inputs.counted))
        return self.mean_over_ranks(sums)

    def mean_over_ranks(self, sums: Tensor) -> float:
        """``sums``: of losses and of targets, [2], zeros but in last stages, fp64; their ratio over all
        ranks."""
        # Ranks of a tensor-parallel group count several times, all equally often.
        self.context.world.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def _receive(self, inputs: Inputs) -> Tensor:
        B, T = inputs.tokens.shape
        if self.context.tensor_parallel.cuts_sequence:
            T //= self.context.tensor.size
        shape = (1 + len(self._stage.entries_received), B, T, self.config.model.hidden_size)
        packed = torch.empty(shape, dtype=self.dtype, device=self.context.device)
        pipeline = self.context.pipeline
        dist.recv(packed, pipeline.ranks[pipeline.rank - 1], group=pipeline.handle)
        return packed
