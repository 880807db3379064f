"""What a run does at a step whose loss or gradient is no number, or far above those before. The engine's gate
has kept the model from it; here it is told, left out, or gone back from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_iiet.config import RunConfig
from megatron_iiet.data.loader.batches import as_ranges
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.retention import REJECTED, mark
from megatron_iiet.training.engine import NotFinite, StepResult, Verdict
from megatron_iiet.training.metrics import LOG, read_log
from megatron_iiet.training.run import Run
from megatron_iiet.training.stopping import failing_together

_NAMED = 3
"""Ranks, and windows of one, that a message names; more are counted."""


class BadNumbersError(FloatingPointError):
    """A run ends at a step that moved nothing."""


@dataclass(frozen=True)
class _Noted:
    """A step that was taken, whose numbers may still be on the device."""

    step: int
    first_sample: int
    result: StepResult


class Guards:
    """Acts on what the gate decided, as soon as the numbers of the steps are read."""

    def __init__(self, run: Run) -> None:
        self._noted: list[_Noted] = []
        self._in_a_row = 0
        self._returns: Counter[int] = Counter()
        self._open_gate(run)

    def note(self, run: Run, first_sample: int, result: StepResult) -> None:
        """A step was taken, of the global batch that starts with this sample."""
        self._noted.append(_Noted(run.step, first_sample, result))

    def settle(self, run: Run) -> bool:
        """Read the numbers of the steps taken since the last time, and act on them. Every rank calls it at
        the same step, before anything is made of the weights.

        Returns:
            whether the run was sent back to an earlier step.

        Raises:
            BadNumbersError: it must not go on.
        """
        noted, self._noted = self._noted, []
        for each in noted:
            verdict = each.result.verdict
            if verdict is Verdict.TRAINED:
                self._in_a_row = 0
            elif verdict is Verdict.LEFT_OUT:
                _say_left_out(run, each)
            elif verdict is Verdict.OVERFLOW:
                run.batches.left_out.add(each.step)
                scale = f"{each.result.loss_scale:,.10g}"
                run.say(f"step {each.step:>6} | left out: a gradient overflows fp16 at loss scale {scale}")
            elif verdict is Verdict.SPIKE and run.config.guards.spike == "rewind":
                self._go_back(run, each)
                return True
            elif verdict is Verdict.NOT_FINITE and run.config.guards.nonfinite == "stop":
                told, everywhere = _whose(run, each)
                raise _error(run, each, f"{_numbers(each)} and moved nothing: {told}", everywhere=everywhere)
            else:
                self._skip(run, each)
        return False

    def _skip(self, run: Run, noted: _Noted) -> None:
        run.batches.left_out.add(noted.step)
        self._in_a_row += 1
        most = run.config.guards.max_skips
        reason, everywhere = _reason(run, noted)
        told = f"{_numbers(noted)}, {reason}"
        if self._in_a_row > most:
            told += f"; the {most} steps before it were left out (guards.max_skips)"
            raise _error(run, noted, told, everywhere=everywhere)
        run.say(f"step {noted.step:>6} | left out: it {told}; its are {_samples(run, noted.first_sample)}")

    def _go_back(self, run: Run, noted: _Noted) -> None:
        """To the newest checkpoint; the steps that led here from there are left out from now on."""
        guards, folder = run.config.guards, _newest(run)
        why = f"{_numbers(noted)}, {_reason(run, noted)[0]}"
        if folder is None:
            raise _error(run, noted, f"{why}, and there is no checkpoint to go back to")
        origin = checkpoint.read_state(folder).step
        self._returns[origin] += 1
        if self._returns[origin] > guards.max_skips:
            raise _error(
                run, noted, f"{why}, after {guards.max_skips} returns (guards.max_skips) to step {origin}"
            )
        first = max(origin + 1, noted.step - guards.window + 1)
        dropped = run.batches.left_out | set(range(first, noted.step + 1))
        run.forget_records(noted.step)
        run.go_back(folder)
        run.batches.left_out |= dropped
        self._in_a_row = 0
        self._open_gate(run)
        run.say(
            f"step {noted.step:>6} | back to {folder}: it {why}; steps {first} to {noted.step} are left out "
            f"from now on, the last of them {_samples(run, noted.first_sample)}"
        )

    def _open_gate(self, run: Run) -> None:
        """With the steps before this one, which the log has to the last bit: nothing else need be saved."""
        if run.config.guards.spike == "off":
            return
        recent = []
        if run.context.is_main and run.step and (Path(run.config.output_dir) / LOG).is_file():
            recent = [
                (values["loss"], values["grad_norm"])
                for step, values in read_log(run.config.output_dir).items()
                if step <= run.step and {"loss", "grad_norm"} <= values.keys() and not values.get("skipped")
            ]
        run.engine.open_gate(run.context.world.gather_objects(recent)[0])


def must_read(config: RunConfig, step: int, last_step: int) -> bool:
    """Whether a line, a check or a checkpoint is due after a step: none may rest on unread numbers."""
    intervals = (
        *(config.logging.interval, config.logging.solver_interval, config.checkpoint.interval),
        *(config.evaluation.interval, config.evaluation.tasks_interval, config.guidance.interval),
    )
    return step == last_step or any(interval and step % interval == 0 for interval in intervals)


def _numbers(noted: _Noted) -> str:
    return f"has loss {noted.result.loss:.6g} and gradient norm {noted.result.grad_norm:.6g}"


def _reason(run: Run, noted: _Noted) -> tuple[str, bool]:
    if noted.result.verdict is Verdict.NOT_FINITE:
        return _whose(run, noted)
    guards = run.config.guards
    return f"more than {guards.deviations:g} deviations above the last {guards.window} steps", False


def _whose(run: Run, noted: _Noted) -> tuple[str, bool]:
    """Ranks, parameters and samples of the gradients that are no numbers, found by a second look; and whether
    it is so on every rank with whatever samples, which speaks against the weights."""
    found = run.engine.look_again(run.batches.again(noted.first_sample))
    if not found:
        told = "a second look at its samples found only finite gradients, so a device may have failed"
        return told, False
    everywhere = len(found) == run.context.world_size and all(
        len(each.micro_steps) == run.engine.accumulation for each in found
    )
    own = next((each for each in found if each.rank == run.context.rank), None)
    rows = [
        row
        for micro_step in (own.micro_steps if own else ())
        for row in run.batches.rows_of(noted.first_sample, micro_step)
    ]
    rows_of_ranks = run.context.world.gather_objects(rows)
    named = [_of_rank(run, each, rows_of_ranks[each.rank]) for each in found[:_NAMED]]
    more = len(found) - _NAMED
    return "; ".join(named) + (f"; and {more} more ranks" if more > 0 else ""), everywhere


def _of_rank(run: Run, found: NotFinite, rows: list[tuple[int, int, int]]) -> str:
    samples = ", ".join(_range(*each) for each in as_ranges(sample for sample, _, _ in rows))
    windows = [f"{window} of {run.corpora[source]}" for _, source, window in rows[:_NAMED]]
    others = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return (
        f"rank {found.rank} has no numbers in the gradients of {len(found.parameters)} parameter(s), "
        f"{found.parameters[0]} first, from samples {samples} (windows {', '.join(windows)}{others})"
    )


def _samples(run: Run, first: int) -> str:
    return f"samples {_range(first, first + run.config.training.global_batch_size - 1)}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _say_left_out(run: Run, noted: _Noted) -> None:
    """Once for steps that follow each other."""
    last = noted.step
    if run.batches.leaves_out(last - 1) and noted.step - 1 > 0:
        return
    while run.batches.leaves_out(last + 1):
        last += 1
    run.say(
        f"step {noted.step:>6} | nothing is trained in step {_range(noted.step, last)}: samples from "
        f"{noted.first_sample} on are left out"
    )


def _newest(run: Run) -> Path | None:
    """The folder of the newest checkpoint, as the main rank sees it, once all that was asked for is there."""
    run.finish_saving()
    with failing_together(run.context):
        tag = checkpoint.latest_tag(run.config.output_dir) if run.context.is_main else None
    tag = run.context.world.gather_objects(tag)[0]
    return None if tag is None else checkpoint.checkpoints_folder(run.config.output_dir) / tag


def _error(run: Run, noted: _Noted, what: str, *, everywhere: bool = False) -> BadNumbersError:
    """The end of a run, with the ways on. A checkpoint after which no rank has a number whatever it reads is
    rejected, if there is an older one."""
    run.forget_records(noted.step)
    folder, config = _newest(run), run.config
    since: range | None = None
    if folder is not None:
        since = range(checkpoint.read_state(folder).step + 1, noted.step)
    first_after = since is not None and all(run.batches.leaves_out(step) for step in since)
    where = "there is no checkpoint yet" if folder is None else f"the newest checkpoint is {folder}"
    if first_after and folder is not None:
        where += ", after which nothing was trained, so its weights may be what is wrong"
        older = run.context.world.gather_objects(len(run.lineage) > 1)[0]
        if everywhere and older:
            where += ": it is rejected, and the next start goes on from the one before"
            if run.context.is_main:
                mark(folder, REJECTED, f"step {noted.step}, the first after it, had no finite gradient")
    ways = [f"a larger guards.deviations (now {config.guards.deviations:g})"]
    if noted.result.verdict is Verdict.NOT_FINITE:
        ways = ["--guards.nonfinite skip"] if config.guards.nonfinite == "stop" else []
    ways += [f"--data.skip_steps [{noted.step}]", f"a smaller optimizer.lr (now {config.optimizer.lr})"]
    if folder is not None:
        ways.append(
            f"from an older checkpoint (python tools/checkpoints.py {config.output_dir} --roll-back STEP)"
        )
    return BadNumbersError(f"step {noted.step} {what}; {where}; resume with {', or '.join(ways)}")
