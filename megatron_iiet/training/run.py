"""A run: everything one process holds while it trains."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_iiet.config import RunConfig, config_to_yaml, iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.solvers import Euler
from megatron_iiet.data.loader.batches import TrainBatches
from megatron_iiet.models.iterations import iterations_at
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import checkpoint, retention
from megatron_iiet.storage.fragments import Fragment
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.storage.selection import lineage_to, next_serial
from megatron_iiet.training.engine import Engine, StepResult, Verdict
from megatron_iiet.training.layout import layout_of
from megatron_iiet.training.lock import RunLock
from megatron_iiet.training.metrics import MetricWriter
from megatron_iiet.training.mirror import Mirror
from megatron_iiet.training.progress import Activity, Progress
from megatron_iiet.training.record import copy_starts, write_configurations
from megatron_iiet.training.resume import CONTENTS
from megatron_iiet.training.saving import HostCopies, Saving, has_room
from megatron_iiet.training.stopping import Poll, failing_together, stop_if_asked
from megatron_iiet.training.utilisation import RankReport, memory_bytes

Measured = TypeVar("Measured")


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
    progress: Progress = field(default_factory=Progress)
    """What it is at."""
    resumed_step: int | None = None
    """Of the checkpoint that this process has read: of all, it is the one that is known to be whole."""
    lineage: checkpoint.Lineage = field(default_factory=list)
    """The checkpoints that led here."""
    before_write: Callable[[Path, int], None] = lambda folder, step: None
    """What is done before this rank's part of a checkpoint is written, given folder and step."""
    after_commit: Callable[[Path, int], None] = lambda folder, step: None
    """What every rank does once it is in force."""
    _saving: Saving | None = None
    _copies: HostCopies = field(default_factory=HostCopies)
    _in_background: bool | None = None
    _stage: tuple[list[int], bool] | None = None
    _values: dict[str, float] = field(default_factory=dict)
    _result: StepResult | None = None
    _unwritten: list[tuple[int, StepResult | None, dict[str, float]]] = field(default_factory=list)
    """Records of steps whose numbers are still on the device, and of those after them."""
    _writer: MetricWriter | None = None
    mirror: Mirror | None = None
    """The main rank's, if checkpoints are copied away."""
    lock: RunLock | None = None
    """The main rank's on the run's folder, if it has one."""
    _recorded: frozenset[str] = frozenset()

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

    def open_record(self) -> None:
        """Open the record (main rank), to go on after this step; every rank calls it."""
        if self.context.is_main:
            self._writer = MetricWriter(
                self.config.output_dir, tensorboard=self.config.logging.tensorboard, first_step=self.step
            )
            self._recorded = self._writer.recorded(self.step)
        self._recorded = self.context.world.gather_objects(self._recorded)[0]

    def lacks(self, names: str) -> bool:
        """Whether a resumed run has a record of its step, but no values whose names begin so: a stop came
        before what was to be done after that step."""
        return bool(self._recorded) and not any(name.startswith(names) for name in self._recorded)

    def record_result(self, result: StepResult) -> None:
        """Add what the step did to its record, once it is read."""
        self._result = result

    def flush(self, *, to_disk: bool = False) -> None:
        """Write this step's record (main rank) and start the next. A record waits for its step's numbers, and
        for the records before it."""
        self._unwritten.append((self.step, self._result, self._values))
        self._result, self._values = None, {}
        self._write_known()
        if to_disk and self._writer is not None:
            self._writer.sync()

    def forget_records(self, first: int) -> None:
        """Write the records that wait, but those of steps from ``first`` on: they moved nothing and count for
        nothing."""
        self._unwritten = [record for record in self._unwritten if record[0] < first]
        self._result, self._values = None, {}
        self._write_known()

    def _write_known(self) -> None:
        while self._unwritten and ((result := self._unwritten[0][1]) is None or result.is_read):
            step, _, values = self._unwritten.pop(0)
            if self._writer is not None:
                self._writer.write(step, ({} if result is None else _numbers_of(result)) | values)

    def stop_if_asked(self, poll: Poll | None = None) -> None:
        """Where training may end, if it is to; every rank calls it at the same place. Not in its last step,
        after which nobody would make up for what is left out. ``poll``: what found that it is time to.

        Raises:
            Stopped: on all ranks.
        """
        if self.step < self.last_step:
            stop_if_asked(self.context, self.lock, poll)

    def stoppable(self, batches: Iterable[Measured]) -> Iterator[Measured]:
        """The batches of a measurement, between which training may end."""
        poll = Poll(self.context.world)
        for batch in batches:
            if poll.due():
                self.stop_if_asked(poll)
            yield batch

    def close(self) -> None:
        """End the reading threads and close the files of the record."""
        self.batches.close()
        if self._writer is not None:
            self._writer.close()

    def enter_stage(self) -> None:
        """Give the layers the iterations of the step about to run, and say so, if they have others."""
        stage = self._stage_of(self.step)
        if stage == self._stage:
            return
        self._stage = iterations, merging = stage
        self.engine.set_iterations(iterations, merging=merging)
        self.say(f"step {self.step:>6} | {self.describe_solver()}")

    def _stage_of(self, step: int) -> tuple[list[int], bool]:
        return (list(self.plan.iterations), True) if self.plan else iterations_at(self.config, step)

    @contextmanager
    def iterating(self, iterations: list[int], *, merging: bool = True) -> Iterator[None]:
        """Other iterations inside the block, without a word; afterwards the stage's again."""
        assert self._stage is not None, "there is no stage to return to"
        before = self._stage
        self.engine.set_iterations(iterations, merging=merging)
        try:
            yield
        finally:
            self.engine.set_iterations(before[0], merging=before[1])

    def as_after_step(self) -> AbstractContextManager[None]:
        """The iterations that the last step had, inside the block: for what a stop kept from being done after
        it."""
        iterations, merging = self._stage_of(self.step - 1)
        return self.iterating(iterations, merging=merging)

    def save(self) -> Path:
        """Begin a checkpoint of this step, once the one before is in force. It is in force, and the run's
        configuration its own, when :meth:`continue_saving` or :meth:`finish_saving` says so.

        Raises:
            FloatingPointError: a weight or moment is no finite number; nothing was written.
            OSError: the one before could not be written.
        """
        with self.progress.at(Activity.SAVE):
            return self._save()

    def _save(self) -> Path:
        self.finish_saving()
        self._refuse_bad_numbers()
        folder = checkpoint.checkpoints_folder(self.config.output_dir) / checkpoint.tag_of(self.step)
        if self.context.is_main and (moved := retention.make_way(folder)):
            self.say(f"warning: {moved}")
        drawn = SaveIdentity.draw(self.step, config_to_yaml(self.config))
        save = self.context.world.gather_objects(drawn)[0]  # nobody has it before the main rank is here
        state = checkpoint.TrainState(
            step=self.step,
            data=deepcopy({**self.batches.state_dict(), CONTENTS: self.contents}),
            layout=layout_of(self.context, self.engine.zero_stage),
            plan=None if self.plan is None else self.plan.to_data(),
            loss_scale=self.engine.loss_scale(),
        )
        fragments = self.engine.fragments()
        copied = self._saves_in_background(fragments)
        if copied:
            fragments = self._copies.take(fragments)
        before = partial(self.before_write, folder, self.step)
        commit = partial(self._commit, folder, state, save)
        seconds = self.config.parallel.resolved_timeouts.save
        self._saving = Saving(self.context, folder, save, fragments, commit, before, seconds)
        if copied:
            self.say(f"step {self.step:>6} | checkpoint {folder} requested")
        else:
            self.finish_saving()
        return folder

    def continue_saving(self) -> None:
        """Let the checkpoint that is being written come into force if it can; every rank, between steps.

        Raises:
            OSError: it could not be written.
        """
        if self._saving is not None and self._saving.advance():
            self._saved(self._saving)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is in force; every rank.

        Raises:
            OSError: it could not be written.
        """
        if self._saving is not None:
            with self.progress.at(Activity.SAVE):
                self._saving.finish()
                self._saved(self._saving)

    def _saved(self, saving: Saving) -> None:
        self._saving = None
        self.after_commit(saving.folder, saving.save.step)
        self.say(f"step {self.step:>6} | checkpoint {saving.folder} durable")
        for warning in saving.warnings:
            self.say(f"warning: {warning}")

    def _commit(self, folder: Path, state: checkpoint.TrainState, save: SaveIdentity) -> list[str]:
        """Make files the newest checkpoint, and remove what is too old; on the main rank, in a thread."""
        output_dir, keep = Path(self.config.output_dir), self.config.checkpoint
        there = [one for one in self.lineage if (folder.with_name(checkpoint.tag_of(one[0]))).is_dir()]
        copy_starts(output_dir, folder)
        state = replace(state, serial=next_serial(output_dir), before=there)
        if self.lock is not None:
            self.lock.check()
        checkpoint.write_metadata(folder, self.config, state, save)
        retention.put_in_force(output_dir, state.step)
        write_configurations(self.config, self.ds_config)
        self.lineage = [*there, (state.step, save.save)]
        told = []
        if self.mirror is not None:
            for step, _ in self.lineage:  # those before this start too, if it was cut short
                self.mirror.give(folder.with_name(checkpoint.tag_of(step)))
            told = self.mirror.told()
        return told + retention.prune(
            output_dir,
            self.lineage,
            keep=keep.keep,
            keep_every=keep.keep_every,
            spared=self.resumed_step,
            mirror=keep.mirror,
        )

    def finish_mirror(self) -> None:
        """Wait until the checkpoints are copied away, and remove what had to wait for that (main rank)."""
        if self.mirror is None:
            return
        keep = self.config.checkpoint
        with self.progress.at(Activity.SAVE):
            told = self.mirror.finish()
        told += retention.prune(
            self.config.output_dir,
            self.lineage,
            keep=keep.keep if self.lineage else 0,
            keep_every=keep.keep_every,
            spared=self.resumed_step,
            mirror=keep.mirror,
        )
        for warning in told:
            self.say(f"warning: {warning}")

    def _saves_in_background(self, fragments: Sequence[Fragment]) -> bool:
        """Whether this run's checkpoints are written while it trains on, as its first one finds."""
        if self._in_background is None:
            mode = self.config.checkpoint.mode
            lack = has_room(self.context, fragments) if mode == "auto" else ""
            self._in_background = mode != "sync" and not lack
            if lack:
                self.say(f"checkpoints are written while training waits: {lack}")
        return self._in_background

    def _refuse_bad_numbers(self) -> None:
        found = self.context.world.gather_objects(self.engine.not_finite())
        bad = [f"{names} of rank {rank}" for rank, names in enumerate(found) if names]
        if bad:
            raise FloatingPointError(
                f"step {self.step} is not saved: {'; '.join(bad[:4])} hold NaN or infinity; the newest "
                "checkpoint is of before: resume from it with a smaller optimizer.lr (now "
                f"{self.config.optimizer.lr}) or a larger optimizer.warmup_fraction"
            )

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            DamagedError: it is not as it was written.
            ValueError: it does not fit this run.
        """
        self.finish_saving()
        with failing_together(self.context):
            state, plan = checkpoint.read_state(folder), checkpoint.read_plan(folder)
            reader = checkpoint.open_weights(folder)
        self.batches.load_state_dict(state.data)
        with reader:
            self.engine.load(reader, self.batches.trained_steps(state.step), state.loss_scale)
        self.step = self.resumed_step = state.step
        if self.context.is_main:  # which writes
            self.lineage = lineage_to(folder)
        guidance = self.config.guidance
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
        self.open_record()

    def ranks(self) -> list[RankReport]:
        """What each rank used since this was asked last; every rank asks."""
        now, most = memory_bytes(self.context.device)
        own = RankReport(
            socket.gethostname(), self.context.pipeline.rank, now, most, self.engine.own_time.take()
        )
        return self.context.world.gather_objects(own)

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
    if not math.isnan(result.loss_scale):
        numbers["loss_scale"] = result.loss_scale
    numbers |= {f"distillation/{name}": value for name, value in result.parts.items()}
    return numbers if result.verdict is Verdict.TRAINED else numbers | {"skipped": 1.0}
