"""The loop and the callbacks around a step: when they act, and what ends a run."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_iiet.training.callbacks import Callback, Checkpointing, MetricLogger, Validation
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.guards import BadNumbersError
from megatron_iiet.training.lock import RunLock
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.run import Run
from tests.training.bare_run import HeldOut, bare_run


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)])
def test_a_step_that_is_not_finite_ends_the_run(loss: float, norm: float, tmp_path: Path) -> None:
    """Nothing of the step is recorded."""
    run = bare_run(
        tmp_path / "run",
        lambda step, lr: (
            StepResult(loss, norm, lr, verdict=Verdict.NOT_FINITE) if step == 3 else StepResult(5.0, 1.0, lr)
        ),
    )
    with pytest.raises(BadNumbersError, match=r"^step 3 has loss .*optimizer\.lr \(now 0\.01\)"):
        train(run, [])
    run.close()
    assert len(run.engine.lrs) == 3  # type: ignore[attr-defined]


def saved_steps(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that a run saves from now on."""
    steps: list[int] = []
    monkeypatch.setattr(run, "save", lambda: steps.append(run.step))
    return steps


def test_a_step_is_in_the_log_before_its_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that is found after it, and on disk."""
    run = bare_run(tmp_path / "run")
    calls: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("on disk"))
    monkeypatch.setattr(run, "save", lambda: calls.append(read_log(tmp_path / "run")[run.step]))
    train(run, [MetricLogger(), Validation(HeldOut(), 4), Checkpointing(4)])  # type: ignore[arg-type]
    run.close()
    assert [call for call in calls if call != "on disk"] == [read_log(tmp_path / "run")[s] for s in (4, 8)]
    assert all("validation_loss" in call for call in calls if call != "on disk")
    assert calls[0] == "on disk"
    assert calls[-2] == "on disk"


@pytest.mark.parametrize(
    ("interval", "first", "stop", "saved"),
    [
        (3, 0, None, [3, 6, 8]),
        (4, 0, None, [4, 8]),
        (0, 0, None, [8]),
        (0, 0, 5, [5]),
        (3, 6, None, [8]),
        (3, 8, None, []),
    ],
)
def test_saves_at_the_interval_and_in_the_end_once(
    interval: int,
    first: int,
    stop: int | None,
    saved: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = bare_run(tmp_path / "run", step=first, training={"stop_after": stop})
    steps = saved_steps(run, monkeypatch)
    train(run, [Checkpointing(interval)])
    run.close()
    assert steps == saved


@pytest.mark.parametrize(("stop", "last"), [(None, 8), (3, 3), (8, 8), (20, 8)])
def test_a_run_ends_at_its_steps_at_the_latest(stop: int | None, last: int, tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", training={"stop_after": stop})
    train(run, [])
    run.close()
    assert run.step == last


@pytest.mark.parametrize(
    ("interval", "first", "validated"),
    [(3, 0, [0, 3, 6, 8]), (4, 0, [0, 4, 8]), (0, 0, [0, 8]), (3, 4, [6, 8])],
)
def test_validates_before_the_first_step_at_the_interval_and_in_the_end(
    interval: int, first: int, validated: list[int], tmp_path: Path
) -> None:
    run = bare_run(tmp_path / "run", step=first)
    train(run, [Validation(HeldOut(), interval)])  # type: ignore[arg-type]
    run.close()
    log = read_log(tmp_path / "run")
    assert list(log) == validated
    assert {values["validation_perplexity"] for values in log.values()} == {math.exp(3.0)}


def test_a_loss_whose_perplexity_is_no_number_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run")
    run.engine.evaluate = lambda batches: 1000.0  # type: ignore[method-assign]
    train(run, [Validation(HeldOut(), 0)])  # type: ignore[arg-type]
    run.close()
    values = read_log(tmp_path / "run")[8]
    assert (values["validation_loss"], values["validation_perplexity"]) == (1000.0, math.exp(700.0))
    assert "validation loss 1000.0000 | perplexity 1014232" in capsys.readouterr().out


class Interrupted(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGUSR1) -> None:
        self.step, self.number = step, number

    def on_step(self, run: Run, result: StepResult) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("step", "finished", "saved"), [(3, False, [3]), (7, False, [7]), (8, True, [8])])
def test_a_signal_ends_training_after_the_step(
    number: int,
    step: int,
    finished: bool,
    saved: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the last one, it ends what ends anyway."""
    run = bare_run(tmp_path / "run")
    steps = saved_steps(run, monkeypatch)
    logger = MetricLogger()
    assert train(run, [logger, Interrupted(step, number), Checkpointing(0)]) is finished
    run.close()
    assert steps == saved
    assert max(read_log(tmp_path / "run")) == step
    said = f"step      {step} | stopping on {signal.Signals(number).name}; the same command goes on from here"
    assert (said in capsys.readouterr().out.splitlines()) is not finished


def test_a_limit_of_time_before_the_first_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from the start of the process, which was before this test."""
    run = bare_run(tmp_path / "run", training={"max_wall_time": 1e-3})
    steps = saved_steps(run, monkeypatch)
    assert not train(run, [MetricLogger(), Checkpointing(1)])
    run.close()
    assert (steps, list((tmp_path / "run").iterdir())) == ([], [])


def test_a_validation_is_left_between_batches_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step that was of the first stage, though the next one is not; into the record of that step."""
    seen: list[Any] = []
    solver = {"kind": "iiet", "iterations": 2, "schedule": [[0.5, 1], [0.5, 2]]}

    def start(step: int, interrupted: str) -> tuple[bool, list[int]]:
        run = bare_run(tmp_path / "run", step=step, solver=solver)

        def evaluate(batches: Any) -> float:
            for batch in batches:
                seen.append((run.step, batch, run.engine.meta_model.solvers[0].iterations))
                if (run.step, batch) == (4, interrupted):
                    os.kill(os.getpid(), signal.SIGUSR1)
            return 3.0

        monkeypatch.setattr(run.engine, "evaluate", evaluate)
        steps = saved_steps(run, monkeypatch)
        validation = Validation(HeldOut(["first", "second", "third"]), 4)  # type: ignore[arg-type]
        finished = train(run, [MetricLogger(), validation, Checkpointing(0)])
        run.close()
        return finished, steps

    def validated(step: int, *batches: str, iterations: int) -> list[tuple[int, str, int]]:
        return [(step, batch, iterations) for batch in batches]

    assert start(0, "second") == (False, [4])
    assert "validation_loss" not in read_log(tmp_path / "run")[4]
    assert start(4, "none") == (True, [8])
    whole = ("first", "second", "third")
    assert seen == [
        *validated(0, *whole, iterations=1),
        *validated(4, *whole[:2], iterations=1),
        *validated(4, *whole, iterations=1),
        *validated(8, *whole, iterations=2),
    ]
    log = read_log(tmp_path / "run")
    assert (log[4]["loss"], log[4]["validation_loss"]) == (5.0, 3.0)
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 9


def test_a_run_whose_folder_is_another_ones_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bare_run(tmp_path / "run")
    run.lock = RunLock(tmp_path / "run", interval=1e6)
    run.lock.take()
    other = replace(run.lock.me, id="other", host="elsewhere")

    class Taken(Callback):
        def on_step(self, run: Run, result: StepResult) -> None:
            if run.step == 3:
                (tmp_path / "run/run.lock").write_bytes(other.to_bytes())
                assert run.lock is not None
                run.lock.beat()

    steps = saved_steps(run, monkeypatch)
    with pytest.raises(ValueError, match=r"was taken over by process .* on elsewhere, .*: this run"):
        train(run, [MetricLogger(), Checkpointing(2), Taken()])
    run.close()
    run.lock.release()
    assert (run.step, steps) == (3, [2])
    assert (tmp_path / "run/run.lock").read_bytes() == other.to_bytes()


def test_sigusr1_is_again_what_it_was(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run = bare_run(tmp_path / "run")
        seen: list[object] = []
        train(run, [SimpleNamespace(  # type: ignore[list-item]
            on_start=lambda run: seen.append(signal.getsignal(signal.SIGUSR1)),
            on_step=lambda run, result: None,
            on_end=lambda run: None,
        )])  # fmt: skip
        run.close()
        assert seen != [signal.SIG_IGN]
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
