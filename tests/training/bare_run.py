"""A run whose engine computes nothing: for what the loop and its callbacks do with what an engine says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from megatron_iiet.config import RunConfig
from megatron_iiet.models import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.parallel.tensor import TensorParallel
from megatron_iiet.training.engine import Engine, NotFinite, StepResult
from megatron_iiet.training.engine.results import OwnTime
from megatron_iiet.training.run import Run
from tests.tiny import tiny_config

PATHS = {"prefix": "not read", "tokenizer": "not read"}


def alone(world_size: int = 1) -> ParallelContext:
    """The main rank, which meets nobody; of a world that is said to be larger."""
    one = Group()
    return ParallelContext(
        rank=0,
        world_size=world_size,
        local_rank=0,
        device=torch.device("cpu"),
        world=one,
        tensor=one,
        data=one,
        pipeline=one,
        tied=one,
        tensor_parallel=TensorParallel(),
    )


class BareEngine:
    """Takes steps whose results are given; knows the model's size, and nothing of numbers."""

    def __init__(
        self,
        config: RunConfig,
        result: Callable[[int, float], StepResult],
        teacher: RunConfig | None = None,
    ) -> None:
        """``result``: of step number (from 1) and learning rate."""
        self.meta_model = Transformer.on_meta(config)
        self.meta_teacher = None if teacher is None else Transformer.on_meta(teacher)
        self.zero_stage = 1
        self.own_time = OwnTime(torch.device("cpu"))
        self.lrs: list[float] = []
        self._result = result

    def set_iterations(self, iterations: list[int], *, merging: bool) -> None:
        self.meta_model.set_iterations(iterations, merging=merging)

    def train_step(self, batches: object, lr: float) -> StepResult:
        self.lrs.append(lr)
        return self._result(len(self.lrs), lr)

    def look_again(self, micro_batches: object) -> list[NotFinite]:
        return []

    def coefficient_norms(self) -> dict[str, float]:
        return {"layers.0.solver.coefficients": 2.0}

    def evaluate(self, batches: object) -> float:
        return 3.0


def bare_run(
    output_dir: Path,
    result: Callable[[int, float], StepResult] = lambda step, lr: StepResult(5.0, 1.0, lr),
    *,
    step: int = 0,
    world_size: int = 1,
    teacher: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Run:
    """A run at ``step`` of :func:`tests.tiny.tiny_config`; ``teacher``: the solver of one."""
    config = tiny_config(PATHS, output_dir, **sections)
    output_dir.mkdir(exist_ok=True)
    of_teacher = None if teacher is None else tiny_config(PATHS, output_dir, solver=teacher)
    engine = BareEngine(config, result, of_teacher)
    skipped = config.data.skipped
    batches = SimpleNamespace(
        settle=lambda: None,
        close=lambda: None,
        consumed_samples=4,
        order=SimpleNamespace(epochs=lambda n: [n / 16]),
        left_out=set(),
        leaves_out=lambda step: step in skipped,
        pass_over=lambda: None,
        again=lambda first_sample: iter(()),
    )
    run = Run(config, {}, alone(world_size), cast(Engine, engine), cast(Any, batches), ["shard"], {})
    run.step = step
    return run


class Clock:
    """Stands in for :mod:`time` where steps are timed: each takes the seconds given."""

    def __init__(self, step_seconds: Iterable[float]) -> None:
        self._now = 0.0
        self._steps = iter(step_seconds)
        self._running = False

    def perf_counter(self) -> float:
        """Called before and after a step; between steps a thousand seconds pass."""
        self._now += next(self._steps) if self._running else 1000.0
        self._running = not self._running
        return self._now


class HeldOut(list[Any]):
    """Batches that an engine of :class:`BareEngine` validates on."""

    rule = "spread"
    samples = 8
