"""The engine without pipeline stages: data and tensor parallelism, ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_iiet.config import RunConfig
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.validation import ValidationBatch, ValidationBatches
from megatron_iiet.models.distilled import Distilled
from megatron_iiet.training.engine.base import Engine
from megatron_iiet.training.engine.corrected import CorrectedEngine, model_parallel_unit
from megatron_iiet.training.engine.phases import phase
from megatron_iiet.training.engine.results import StepResult


class PlainEngine(Engine):
    """All layers on every rank."""

    def _start(self, config: RunConfig, ds_config: dict[str, Any]) -> CorrectedEngine:
        mpu = model_parallel_unit(self.context)
        module = self.model if self.teacher is None else Distilled(self.model, self.teacher)
        return CorrectedEngine.start(module, self.model, config, ds_config, self.context, mpu)

    def train_step(self, micro_batches: Iterator[Batch], lr: float) -> StepResult:
        engine = self._engine
        engine.train()
        self._expect_gradient()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.context.device)
        module = engine.module
        parts = module.parts if isinstance(module, Distilled) else None
        for micro_step in range(1, self.accumulation + 1):
            with self.own_time.counted():
                with phase("data"):
                    inputs = self._inputs(next(micro_batches))
                with phase("forward"):
                    loss = engine(*inputs)
            with phase("backward"):
                engine.backward(loss)
            total += loss.detach()
            if micro_step == self.accumulation:  # the optimizer is next
                engine.gate.begin(self._numbers(self.context.data.mean(total / self.accumulation), parts))
            with phase("optimizer"):
                engine.step()
        return self._step_result(lr)

    @torch.no_grad()
    def evaluate(self, batches: ValidationBatches | list[ValidationBatch]) -> float:
        self._engine.eval()
        # Of losses and of targets; in fp64, which counts on where fp32 stops at 2^24.
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for batch in batches:
            inputs = self._inputs(batch)
            sums += torch.stack((self._engine(*inputs), inputs.counted))
        self._engine.train()
        self.context.data.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    @torch.no_grad()
    def _forward(self, batch: Batch | ValidationBatch) -> None:
        self._engine.eval()
        self._engine(*self._inputs(batch))
        self._engine.train()
