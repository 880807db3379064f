"""The engine with pipeline stages, run by DeepSpeed's 1F1B schedule; ZeRO 0 and 1."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any, cast

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.data.batches import ValidationBatches
from megatron_iiet.models.pipeline import PipelineStage, entries_crossing
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine.base import Engine, StepResult
from megatron_iiet.training.engine.corrected import CorrectedEngine


class PipelinedEngine(Engine):
    """Some of the layers on every rank; micro-batches flow through the stages."""

    _engine: _CorrectedPipelineEngine

    def _start(self, config: RunConfig, ds_config: dict[str, Any]) -> _CorrectedPipelineEngine:
        self.stage = PipelineStage(self.model, config.data.sequence_length)
        module = _StageModule(self.stage, self.context)
        return _CorrectedPipelineEngine.start(module, config, ds_config, self.context, module.mpu())

    def train_step(self, micro_batches: Iterator[Tensor], lr: float) -> StepResult:
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss = engine.train_batch(self._split(windows) for windows in micro_batches)
        return StepResult(loss.item(), float(engine.get_global_grad_norm()), lr)

    def evaluate(self, batches: ValidationBatches) -> float:
        def inputs() -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
            for windows, weights in batches:
                tokens, targets = self._split(windows)
                yield tokens, (targets, weights)

        # DeepSpeed averages over micro-batches and replicas; wanted is the sum over weights of 1.
        mean = self._engine.eval_batch(inputs(), num_micro_batches=len(batches)).item()
        return cast(float, mean * len(batches) * self.context.data.size / batches.samples)

    def _forward(self, windows: Tensor) -> None:
        self._engine.eval_batch(iter([self._split(windows)]), num_micro_batches=1)

    def set_iterations(self, iterations: list[int], *, merging: bool) -> None:
        super().set_iterations(iterations, merging=merging)
        self._resize_payload()

    def _resize_payload(self) -> None:
        stages = self.plan.stages
        if not self.model.is_last:
            following = stages[self.context.pipeline.rank + 1].start
            self.stage.entries_handed_on = entries_crossing(self.whole, following)
        self._engine.reset_activation_shape()


class _CorrectedPipelineEngine(CorrectedEngine, PipelineEngine):
    """DeepSpeed's pipeline engine with the corrections that every engine here has."""


class _StageModule(PipelineModule):
    """DeepSpeed's view of the pipeline: one layer a stage, each on the ranks of its stage only."""

    def __init__(self, stage: PipelineStage, context: ParallelContext) -> None:
        self._context = context
        topology = PipeModelDataParallelTopology(
            num_pp=context.pipeline.size, num_mp=context.tensor.size, num_dp=context.data.size
        )
        with redirect_stdout(io.StringIO()):  # it describes the stages; the stage plan says more
            super().__init__(
                layers=[stage] * context.pipeline.size,  # it takes the one at this rank's place
                topology=topology,
                loss_fn=_Loss(stage.model) if stage.model.is_last else None,
                partition_method="uniform",
            )
        if self._tied_weight() is not None and not stage.model.is_first:
            self._tied_weight().ds_pipe_replicated = True  # counts once in the gradient norm

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.forward_funcs[0](x))

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """What DeepSpeed sums the gradient of over the first and last stage."""
        weight = self._tied_weight()
        return [] if weight is None else [(weight, self._context.tied.handle)]

    def _tied_weight(self) -> Any:
        model = cast(Transformer, self.forward_funcs[0].model)
        tied = model.config.model.tie_embeddings and model.embedding is not None
        return cast(Any, model.embedding).weight if tied else None


class _Loss:
    """Loss of the last stage's logits; labels are targets, in validation with row weights."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, logits: Tensor, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        targets, weights = (labels, None) if isinstance(labels, torch.Tensor) else labels
        return self.model.loss(logits, targets, weights)
