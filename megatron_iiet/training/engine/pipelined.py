"""The engine with pipeline stages, run by DeepSpeed's 1F1B schedule; ZeRO 0 and 1."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial, wraps
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from megatron_iiet.config import RunConfig
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.inputs import Inputs
from megatron_iiet.data.loader.validation import ValidationBatch, ValidationBatches
from megatron_iiet.models.distilled import DistilledStage
from megatron_iiet.models.pipeline import PipelineStage
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.training.engine.base import Engine
from megatron_iiet.training.engine.corrected import CorrectedEngine
from megatron_iiet.training.engine.deepspeed_internals import (
    PipelineEngine,
    PipelineModule,
    PipeModelDataParallelTopology,
    sums_apart,
)
from megatron_iiet.training.engine.phases import phase
from megatron_iiet.training.engine.results import OwnTime, StepResult

Labels = Tensor | tuple[Tensor, Tensor]
"""Targets [b, T], or targets and what the sum of their losses is divided by."""


class PipelinedEngine(Engine):
    """Some of the layers on every rank; micro-batches flow through the stages."""

    _engine: _CorrectedPipelineEngine

    def _start(self, config: RunConfig, ds_config: dict[str, Any]) -> _CorrectedPipelineEngine:
        self.stage = PipelineStage(self.model, config.data.sequence_length)
        self.distilled = None
        if self.teacher is not None:
            assert self.meta_teacher is not None
            self.distilled = DistilledStage(self.stage, self.teacher, self.meta_teacher)
        self._module = _StageModule(self.stage, self.distilled, self.context, self.own_time)
        engine = _CorrectedPipelineEngine.start(
            self._module, self.model, config, ds_config, self.context, self._module.mpu()
        )
        self._module.sums_apart = sums_apart(engine)
        parts = None if self.distilled is None else self.distilled.pair.parts
        engine.numbers = partial(self._numbers, parts=parts)
        return engine

    def train_step(self, micro_batches: Iterator[Batch], lr: float) -> StepResult:
        engine = self._engine
        self._let_payload_change()
        self._expect_gradient()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.train_batch(self._feed(self._inputs(batch) for batch in micro_batches))
        return self._step_result(lr)

    def evaluate(self, batches: ValidationBatches | list[ValidationBatch]) -> float:
        counted = torch.zeros((), dtype=torch.float64, device=self.context.device)

        def inputs() -> Iterator[Inputs]:
            for batch in batches:
                inputs = self._inputs(batch)
                counted.add_(inputs.counted)
                yield inputs

        self._let_payload_change()
        # DeepSpeed averages over micro-batches and replicas; wanted is the mean over targets.
        mean = self._engine.eval_batch(self._feed(inputs()), num_micro_batches=len(batches)).item()
        self.context.data.all_reduce(counted)
        return (mean * len(batches) * self.context.data.size / counted).item()

    def _forward(self, batch: Batch | ValidationBatch) -> None:
        self._let_payload_change()
        self._engine.eval_batch(self._feed([self._inputs(batch)]), num_micro_batches=1)

    def _feed(self, inputs: Iterable[Inputs]) -> _Feed:
        """Have this stage read ``inputs`` in the schedule about to run."""
        self._module.feed = _Feed(inputs, is_loaded=self.model.is_first or self.model.is_last)
        return self._module.feed

    def set_iterations(self, iterations: list[int], *, merging: bool) -> None:
        super().set_iterations(iterations, merging=merging)
        self.stage.resize(self.meta_model)
        self._engine.reset_activation_shape()

    def _let_payload_change(self) -> None:
        """The teacher's stream goes from stage to stage in training only."""
        if self.distilled is not None:
            self._engine.reset_activation_shape()


_PHASE_OF = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "optimizer",
    "ReduceTiedGrads": "optimizer",
    "OptimizerStep": "optimizer",
}
"""Of DeepSpeed's instructions; the others send or receive."""


def _labelled(name: str, carry_out: Callable[..., None]) -> Callable[..., None]:
    """What carries out an instruction, as a phase of the step."""

    @wraps(carry_out)
    def labelled(*args: Any, **kwargs: Any) -> None:
        with phase(name):
            carry_out(*args, **kwargs)

    return labelled


class _CorrectedPipelineEngine(CorrectedEngine, PipelineEngine):
    """DeepSpeed's pipeline engine with the corrections that every engine here has."""

    numbers: Callable[[Tensor], Tensor]
    """What a step is judged by, from its loss; every stage calls it."""
    step_loss: Tensor
    """Mean over the replicas of the step in progress, known before the optimizer steps."""

    _INSTRUCTION_MAP: ClassVar = {
        instruction: _labelled(_PHASE_OF.get(instruction.__name__, "exchange"), carry_out)
        for instruction, carry_out in PipelineEngine._INSTRUCTION_MAP.items()
    }

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.step_loss = super()._aggregate_total_loss()
            self.gate.begin(self.numbers(self.step_loss))
        super()._take_model_step(*args, **kwargs)

    def _aggregate_total_loss(self) -> Tensor:
        return self.step_loss


class _Feed(Iterator[tuple[Tensor, Labels]]):
    """The micro-batches of one schedule, as one stage reads them.

    In the first and the last stage DeepSpeed loads a micro-batch right before its forward pass. A stage
    between reads it as its forward pass begins: it needs the positions, and a student's the targets, which
    do not travel through the pipeline.
    """

    def __init__(self, inputs: Iterable[Inputs], *, is_loaded: bool) -> None:
        self._inputs = iter(inputs)
        self._is_loaded = is_loaded
        self._next: Inputs | None = None
        """What was read, and whose forward pass is to come."""

    def __next__(self) -> tuple[Tensor, Labels]:
        """Input of the first stage and labels of the last one."""
        assert self._next is None, "a micro-batch was loaded, but did not run"
        self._next = tokens, targets, _, divisor = next(self._inputs)
        return tokens, targets if divisor is None else (targets, torch.tensor(divisor))

    def begin(self) -> Inputs:
        """The micro-batch whose forward pass begins."""
        if not self._is_loaded:
            next(self)
        assert self._next is not None, "a micro-batch runs that was not loaded"
        inputs, self._next = self._next, None
        return inputs


class _StageModule(PipelineModule):
    """DeepSpeed's view of the pipeline: one layer a stage, each on the ranks of its stage only."""

    feed: _Feed
    """What the schedule in progress reads."""
    sums_apart: bool
    """Whether the optimizer sums gradients beside the parameters' own."""
    _model: Transformer

    def __init__(
        self,
        stage: PipelineStage,
        distilled: DistilledStage | None,
        context: ParallelContext,
        own_time: OwnTime,
    ) -> None:
        self._context = context
        self._own_time = own_time
        object.__setattr__(self, "_model", stage.model)  # no submodule: the stage has it
        topology = PipeModelDataParallelTopology(
            num_pp=context.pipeline.size, num_mp=context.tensor.size, num_dp=context.data.size
        )
        with redirect_stdout(io.StringIO()):  # it describes the stages; the stage plan says more
            super().__init__(
                # It takes the one at this rank's place.
                layers=[stage if distilled is None else distilled] * context.pipeline.size,
                topology=topology,
                loss_fn=_as_it_is if stage.model.is_last else None,
                partition_method="uniform",
            )
        if self._tied_weight() is not None and not stage.model.is_first:
            self._tied_weight().ds_pipe_replicated = True  # counts once in the gradient norm

    def forward(self, x: Any) -> Any:
        """What goes to the next stage; in the last one the loss, for what a backward pass has reached before
        this module's output, DeepSpeed forgets in bf16."""
        with self._own_time.counted() if self.training else nullcontext():
            return self._forward(x)

    def _forward(self, x: Any) -> Any:
        stage, inputs = self.forward_funcs[0], self.feed.begin()
        if isinstance(stage, DistilledStage) and self.training:
            output = stage(x, inputs.targets, inputs.positions, inputs.divisor)
            return stage.loss(output, inputs.targets, inputs.divisor) if self._model.is_last else output
        output = (stage.student if isinstance(stage, DistilledStage) else stage)(x, inputs.positions)
        return self._model.loss(output, inputs.targets, inputs.divisor) if self._model.is_last else output

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """What DeepSpeed sums the gradient of over the first and last stage."""
        weight = self._tied_weight()
        if weight is None:
            return []
        return [(_SummedApart(weight) if self.sums_apart else weight, self._context.tied.handle)]

    def _tied_weight(self) -> Any:
        model = self._model
        tied = model.config.model.tie_embeddings and model.embedding is not None
        return cast(Any, model.embedding).weight if tied else None


class _SummedApart:
    """A parameter by the gradient that the optimizer steps with, which DeepSpeed looks for in its own."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    @property
    def grad(self) -> Tensor | None:
        return cast("Tensor | None", self._weight.grad_accum)


def _as_it_is(loss: Tensor, labels: Labels) -> Tensor:
    return loss
