"""A run: everything one process holds while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_iiet.config import RunConfig, config_to_yaml, iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.solvers import Euler
from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.models.iterations import iterations_at
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.training.engine import Engine, StepResult, Verdict
from megatron_iiet.training.layout import layout_of
from megatron_iiet.training.metrics import MetricWriter
from megatron_iiet.training.record import copy_starts, write_configurations
from megatron_iiet.training.resume import CONTENTS
from megatron_iiet.training.utilisation import memory_bytes


@dataclass(eq=False)
class Run:
    """Engine, data position and step of one training process; passed to every callback."""

    config: RunConfig
    ds_config: dict[str, Any]
    context: ParallelContext
    engine: Engine
    batches: TrainBatches
    """This rank's, in their place."""
    corpora: Sequence[str]
    """Names of what the batches are blended from."""
    contents: dict[str, Any]
    """What the corpora and the tokenizer hold."""
    step: int = 0
    plan: IterationPlan | None = None
    """What guidance decided last; it goes before the iterations that the configuration has for a step."""
    step_seconds: float = 0.0
    _stage: tuple[list[int], bool] | None = None
    _values: dict[str, float] = field(default_factory=dict)
    _result: StepResult | None = None
    _unwritten: list[tuple[int, StepResult | None, dict[str, float]]] = field(default_factory=list)
    """Records of steps whose numbers are still on the device, and of those after them."""
    _writer: MetricWriter | None = None

    @property
    def last_step(self) -> int:
        """The step that this process ends with."""
        stop, steps = self.config.training.stop_after, self.config.training.steps
        return steps if stop is None else min(stop, steps)

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.context.is_main:
            print(text, flush=True)

    def record(self, values: dict[str, float]) -> None:
        """Add values to this step's record."""
        self._values.update(values)

    def record_result(self, result: StepResult) -> None:
        """Add what the step did to its record, once it is read."""
        self._result = result

    def flush(self) -> None:
        """Write this step's record (main rank) and start the next. A record waits for its step's numbers, and
        for the records before it."""
        self._unwritten.append((self.step, self._result, self._values))
        self._result, self._values = None, {}
        self._write_known()

    def forget_records(self, first: int) -> None:
        """Write the records that wait, but those of steps from ``first`` on: they moved nothing and count for
        nothing."""
        self._unwritten = [record for record in self._unwritten if record[0] < first]
        self._result, self._values = None, {}
        self._write_known()

    def _write_known(self) -> None:
        while self._unwritten and ((result := self._unwritten[0][1]) is None or result.is_read):
            step, _, values = self._unwritten.pop(0)
            self._write(step, ({} if result is None else _numbers_of(result)) | values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.context.is_main:
            if self._writer is None:
                self._writer = MetricWriter(
                    self.config.output_dir, tensorboard=self.config.logging.tensorboard, first_step=self.step
                )
            self._writer.write(step, values)

    def close(self) -> None:
        """End the reading threads and close the files of the record."""
        self.batches.close()
        if self._writer is not None:
            self._writer.close()

    def enter_stage(self) -> None:
        """Give the layers the iterations of the step about to run, and say so, if they have others."""
        stage = (list(self.plan.iterations), True) if self.plan else iterations_at(self.config, self.step)
        if stage == self._stage:
            return
        self._stage = iterations, merging = stage
        self.engine.set_iterations(iterations, merging=merging)
        self.say(f"step {self.step:>6} | {self.describe_solver()}")

    @contextmanager
    def iterating(self, iterations: list[int]) -> Iterator[None]:
        """Other iterations inside the block, without a word; afterwards the stage's again."""
        assert self._stage is not None, "there is no stage to return to"
        before, merging = self._stage
        self.engine.set_iterations(iterations, merging=True)
        try:
            yield
        finally:
            self.engine.set_iterations(before, merging=merging)

    def save(self) -> Path:
        """Write a checkpoint of this step and make it the newest, and the run's configuration its own."""
        tag, output_dir = checkpoint.tag_of(self.step), Path(self.config.output_dir)
        folder = checkpoint.checkpoints_folder(output_dir)
        if self.context.is_main:
            checkpoint.invalidate(folder / tag)
        drawn = SaveIdentity.draw(self.step, config_to_yaml(self.config))
        save = self.context.world.gather_objects(drawn)[0]  # nobody has it before the main rank is here
        self.engine.save(folder / tag, save)
        if self.context.is_main:
            copy_starts(output_dir, folder / tag)
            state = checkpoint.TrainState(
                step=self.step,
                data={**self.batches.state_dict(), CONTENTS: self.contents},
                layout=layout_of(self.context, self.engine.zero_stage),
                plan=None if self.plan is None else self.plan.to_data(),
            )
            checkpoint.write_metadata(folder / tag, self.config, state, save)
            warnings = checkpoint.commit(output_dir, self.step, self.config.checkpoint.keep)
            write_configurations(self.config, self.ds_config)
            for warning in warnings:
                self.say(f"warning: {warning}")
        self.context.barrier()
        return folder / tag

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            ValueError: it does not fit this run.
        """
        state = checkpoint.read_state(folder)
        self.batches.load_state_dict(state.data)
        with checkpoint.open_weights(folder) as reader:
            self.engine.load(reader, self.batches.trained_steps(state.step))
        self.step = state.step
        plan, guidance = checkpoint.read_plan(folder), self.config.guidance
        if plan is not None and guidance.interval:
            # One made for another cap or budget no longer holds.
            full = iterations_per_layer(self.config)
            valid = ([plan.full] * len(full), plan.budget) == (full, guidance.budget)
            self.plan = plan if valid else None

    def go_back(self, folder: Path) -> None:
        """Continue from an earlier checkpoint of this run, in the same process.

        Raises:
            ValueError: it cannot be read.
        """
        if self._writer is not None:  # the next one takes the events after that step out
            self._writer.close()
            self._writer = None
        self.plan, self._stage = None, None
        self.resume(folder)

    def memory_of_ranks(self) -> list[tuple[int, int]]:
        """Bytes that each rank holds of its device's memory, and the most it held; every rank asks."""
        return self.context.world.gather_objects(memory_bytes(self.context.device))

    def epochs(self) -> dict[str, float]:
        """How many times each corpus has been read, by name."""
        epochs = self.batches.order.epochs(self.batches.consumed_samples)
        return dict(zip(self.corpora, epochs, strict=True))

    def describe_solver(self) -> str:
        """The solver in force, in a few words."""
        solver, layers = self.config.solver, self.engine.meta_model.solvers
        if not layers[0].merging:
            return f"solver {Euler().describe(())}"
        counts = [layer.iterations for layer in layers.values()]
        described = f"solver {solver.describe(counts)}"
        if not self.config.guidance.interval:
            return described
        used, full = sum(r + 1 for r in counts), sum(r + 1 for r in iterations_per_layer(self.config))
        source = "even until the first plan" if self.plan is None else f"planned after step {self.plan.step}"
        return f"{described}, {used} of {full} evaluations ({used / full:.0%}), {source}"


def _numbers_of(result: StepResult) -> dict[str, float]:
    """What a step's record has of it."""
    if result.verdict is Verdict.LEFT_OUT:
        return {"lr": result.lr, "skipped": 1.0}
    numbers = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
    numbers |= {f"distillation/{name}": value for name, value in result.parts.items()}
    return numbers if result.verdict is Verdict.TRAINED else numbers | {"skipped": 1.0}
