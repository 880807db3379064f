"""What the trainer sees of an engine, whether the model is pipelined or not."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.config.deepspeed import zero_stage
from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.inputs import Inputs, inputs_of
from megatron_iiet.data.loader.validation import ValidationBatch, ValidationBatches
from megatron_iiet.models.compiled import compile_layers
from megatron_iiet.models.diagnostics import IterateStatistics, observe_iterates
from megatron_iiet.models.distilled import LossParts, teacher_config
from megatron_iiet.models.pipeline import stage_plan
from megatron_iiet.models.transformer import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.context import groups_with_timeout
from megatron_iiet.storage.fragments import Fragment, FragmentReader
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.storage.source import Source
from megatron_iiet.training.engine.corrected import CorrectedEngine, model_parallel_unit
from megatron_iiet.training.engine.optimizer_state import load_fragments, own_fragments, start_from
from megatron_iiet.training.engine.results import OwnTime, Ring, StepResult
from megatron_iiet.training.host_memory import keep_freed_memory
from megatron_iiet.training.saving import Saving
from megatron_iiet.training.stopping import failing_together, stop_if_asked
from megatron_iiet.training.warm_start import WarmStart

_TERMS = tuple(LossParts.__annotations__)
"""Of a loss that has several."""


@dataclass(frozen=True)
class NotFinite:
    """What one rank finds in the gradients of a step, on its own micro-batches and before any exchange."""

    rank: int
    micro_steps: tuple[int, ...]
    """Those that have gradients which are no numbers."""
    parameters: tuple[str, ...]
    """Whose they are, in the order of the backward pass."""


class Engine(ABC):
    """A model with its optimizer under DeepSpeed: steps, evaluates, saves and loads."""

    model: Transformer
    """This rank's part of the model."""
    meta_model: Transformer
    """The whole model on the meta device: its counts, FLOPs and iterations."""
    teacher: Transformer | None
    """This rank's part of the model that is learned from."""
    meta_teacher: Transformer | None
    """As :attr:`meta_model`."""
    _engine: CorrectedEngine
    ring: Ring
    """Numbers of the steps taken, until they are read."""
    own_time: OwnTime
    """What this rank needs for itself in training."""

    def __init__(
        self,
        config: RunConfig,
        ds_config: dict[str, Any],
        context: ParallelContext,
        backend: str,
        *,
        initialise: bool = True,
        warm: WarmStart | None = None,
        teacher: Source | None = None,
    ) -> None:
        """``ds_config`` is the reconciled DeepSpeed JSON (no "auto" left), ``backend`` that of the merges.
        Without ``initialise`` the matrices hold whatever they hold: for a checkpoint that is about to be
        loaded. ``warm``: which parameters start with the values of another model; ``teacher``: the model to
        learn from.
        """
        deepspeed_logger.setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_init_required=False)  # takes over the process group there is
        self.context = context
        if context.device.type == "cpu":
            keep_freed_memory()
        self.zero_stage = zero_stage(ds_config)
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        self.meta_model = Transformer.on_meta(config)
        self.plan = stage_plan(config, self.meta_model)
        self.model = self._part_of(config, ds_config, backend)
        self.teacher = self.meta_teacher = None
        if teacher is not None:
            taught_by = teacher_config(config, teacher.config)
            self.meta_teacher = Transformer.on_meta(taught_by)
            self.teacher = self._part_of(taught_by, ds_config, backend)
            with failing_together(context):  # ranks that gather a parameter read the same of it
                for name, parameter in self.teacher.named_parameters():
                    with self._writable(parameter):
                        teacher.fill_parameter(name, parameter, context.tensor)
        if initialise:
            taken = warm.taken if warm is not None else frozenset()
            self.model.initialise(config.training.seed, writable=self._writable, keep=taken)
        stop_if_asked(context)
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.own_time = OwnTime(context.device)
        self._copies = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None
        with groups_with_timeout(config.parallel.resolved_timeouts.longest):
            self._engine = self._start(config, ds_config)
        self.ring = Ring(at_once=context.device.type == "cpu")
        self.model.loss_gradient = 1 / self.accumulation
        if warm is not None:
            start_from(self._engine, self._names, warm)
        self.set_iterations(iterations_per_layer(config), merging=True)

    def _part_of(self, config: RunConfig, ds_config: dict[str, Any], backend: str) -> Transformer:
        """This rank's part of a model, its matrices undrawn."""
        born: AbstractContextManager[Any] = nullcontext()
        if self.zero_stage == 3:  # no rank ever holds more than a module's parameters whole
            born = deepspeed.zero.Init(
                data_parallel_group=self.context.data.handle,
                config_dict_or_path=ds_config,
                mpu=model_parallel_unit(self.context),
                mem_efficient_linear=False,
            )
        with self.context.device, born:
            model = Transformer(
                config,
                backend=backend,
                parallel=self.context.tensor_parallel,
                layers=self.plan.stages[self.context.pipeline.rank],
            )
        model.parameters_in_parts = self.zero_stage == 3
        if config.training.compile == "layer":
            compile_layers(model)
        return model

    @abstractmethod
    def _start(self, config: RunConfig, ds_config: dict[str, Any]) -> CorrectedEngine:
        """DeepSpeed's engine around :attr:`model`, and :attr:`teacher` if there is one."""

    @abstractmethod
    def train_step(self, micro_batches: Iterator[Batch], lr: float) -> StepResult:
        """One optimizer step over the next ``accumulation`` micro-batches."""

    @abstractmethod
    def evaluate(self, batches: ValidationBatches | list[ValidationBatch]) -> float:
        """Mean cross-entropy in nats per token over all targets, of all replicas, in rows of weight 1."""

    @abstractmethod
    def _forward(self, batch: Batch | ValidationBatch) -> None:
        """A forward pass without gradients whose result nobody needs."""

    def set_iterations(self, iterations: list[int], *, merging: bool) -> None:
        """Change the corrector iterations of all layers, see :meth:`Transformer.set_iterations`."""
        for model in (self.model, self.meta_model):
            model.set_iterations(iterations, merging=merging)
        self._engine.forget_gradients()

    def observe(self, batch: Batch | ValidationBatch) -> IterateStatistics:
        """Statistics of the iterates of all layers in a forward pass on a batch.

        Under tensor parallelism they are over the main rank's tokens; the same on every rank of a pipeline.
        """
        weights_B = batch.weights.to(self.context.device) if isinstance(batch, ValidationBatch) else None
        with observe_iterates(self.model, weights_B) as statistics:
            self._forward(batch)
        for part in self.context.pipeline.gather_objects(statistics):
            statistics.update(part)
        return statistics

    def coefficient_norms(self) -> dict[str, float]:
        """Euclidean norm of every solver's merge coefficients, by parameter; the same on every rank."""
        named = {
            name: p for p, name in self._names.items() if name.endswith("coefficients") and p.requires_grad
        }
        with self._gathered(list(named)):
            own = {name: p.detach().float().norm().item() for name, p in named.items()}
        parts = self.context.pipeline.gather_objects(own)
        return {name: norm for part in parts for name, norm in part.items()}

    @property
    def optimizer_class(self) -> str:
        """What steps, by its full name."""
        kind = type(self._engine.basic_optimizer)
        return f"{kind.__module__}.{kind.__qualname__}"

    def fragments(self) -> list[Fragment]:
        """What this rank writes of a checkpoint: views of masters and moments, which a step changes."""
        return own_fragments(self._engine, self._names)

    def save(self, folder: Path, save: SaveIdentity) -> None:
        """Write weights and moments, without what makes a checkpoint of them; every rank calls it."""
        Saving(self.context, folder, save, self.fragments()).finish()

    def not_finite(self) -> str:
        """Masters and moments that this rank would write and that are no finite numbers, the first named."""
        found = [
            f"{kind} of {fragment.name}"
            for fragment in self.fragments()
            for kind, tensor in fragment.tensors.items()
            if not tensor.isfinite().all()
        ]
        return "" if not found else found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"

    def loss_scale(self) -> dict[str, Any] | None:
        """What a checkpoint has of an fp16 run's loss scale; None in other precisions."""
        scale = self._engine.own_scale
        return None if scale is None else scale.state()

    def load(
        self, reader: FragmentReader, optimizer_steps: int, loss_scale: dict[str, Any] | None = None
    ) -> None:
        """Restore weights and optimizer from a checkpoint of any layout. ``loss_scale``: what it has of one;
        without, an fp16 run starts with a new one.

        Raises:
            ValueError: files are missing, damaged, or of another model.
        """
        load_fragments(self._engine, self._names, reader, optimizer_steps)
        if self._engine.own_scale is not None and loss_scale is not None:
            self._engine.own_scale.load(loss_scale)
        self._engine.global_steps = optimizer_steps
        self.context.barrier()

    def gathered_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and working copy of each of this rank's parameters, whole under ZeRO-3; for inspection."""
        for parameter, name in self._names.items():
            with self._gathered([parameter]):
                yield name, parameter.detach().clone()

    def _writable(self, parameter: Any) -> AbstractContextManager[None]:
        return self._gathered([parameter], modifier_rank=0)

    def _gathered(
        self, parameters: list[Any], modifier_rank: int | None = None
    ) -> AbstractContextManager[None]:
        if self.zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)

    def look_again(self, micro_batches: Iterator[Batch]) -> list[NotFinite]:
        """Go through a step's batch once more, moving nothing: which ranks have gradients that are no
        numbers, of which parameters. Every rank calls it, between steps."""
        found: dict[str, list[int]] = {}
        passes: dict[str, int] = {}

        def look(name: str, gradient: Tensor) -> None:
            passes[name] = passes.get(name, -1) + 1
            if not gradient.isfinite().all():
                found.setdefault(name, []).append(passes[name])

        named = [(name, p) for p, name in self._names.items() if p.requires_grad]
        hooks = [parameter.register_hook(partial(look, name)) for name, parameter in named]
        try:
            with self._engine.gate.shut():
                self.train_step(micro_batches, self._engine.optimizer.param_groups[0]["lr"])
        finally:
            for hook in hooks:
                hook.remove()
        self.ring.read()
        self._engine.global_steps -= 1
        self._engine.forget_gradients()
        micro_steps = sorted({number for numbers in found.values() for number in numbers})
        own = NotFinite(self.context.rank, tuple(micro_steps), tuple(found))
        return [each for each in self.context.world.gather_objects(own) if each.parameters]

    def open_gate(self, recent: Sequence[tuple[float, float]]) -> None:
        """Let steps move the model again; ``recent``: loss and gradient norm of the last that did."""
        self._engine.gate.open(recent)

    def _numbers(self, loss: Tensor, parts: list[LossParts] | None) -> Tensor:
        """Loss of a step and the terms of it, fp64 [1 + terms], before the optimizer steps; ``parts``: this
        rank's of the terms, one a micro-batch, which it takes."""
        if parts is None:
            return loss.detach().to(torch.float64).reshape(1)
        sums = torch.stack([torch.stack(each) for each in parts]).sum(0)
        parts.clear()
        means = self.context.data.mean(sums / self.accumulation)
        self.context.pipeline.all_reduce(means)  # a stage knows its own
        total = LossParts(*means.unbind()).total(self.model.config.distillation)
        return torch.cat((total.reshape(1), means)).to(torch.float64)

    def _expect_gradient(self) -> None:
        """Tell the model by what the gradients of the step that begins are scaled."""
        if self._engine.own_scale is not None:
            self.model.loss_gradient = self._engine.own_scale.value / self.accumulation

    def _step_result(self, lr: float) -> StepResult:
        """Of the step that ends."""
        numbers = self._engine.gate.decide(self._engine.get_global_grad_norm())
        return self.ring.put(numbers, _TERMS if self.teacher is not None else (), lr)

    def _inputs(self, batch: Batch | ValidationBatch) -> Inputs:
        """On the device before they are needed: copied beside what it still computes of the batch before."""
        if self._copies is None:
            return inputs_of(batch, self.context.device)
        computing = torch.cuda.current_stream(self.context.device)
        with torch.cuda.stream(self._copies):
            inputs = inputs_of(batch, self.context.device)
        computing.wait_stream(self._copies)
        for each in inputs:
            if isinstance(each, Tensor):
                each.record_stream(computing)  # its memory is not the copies' again before that is done
        return inputs
