"""The loop and the callbacks around a step: when they act, and what ends a run."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_iiet.training.callbacks import Checkpointing, Validation
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.guards import BadNumbersError
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from tests.training.bare_run import bare_run


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
    steps: list[int] = []
    monkeypatch.setattr(run, "save", lambda: steps.append(run.step))
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
    train(run, [Validation([], interval)])  # type: ignore[arg-type]
    run.close()
    log = read_log(tmp_path / "run")
    assert list(log) == validated
    assert {values["validation_perplexity"] for values in log.values()} == {math.exp(3.0)}


def test_a_loss_whose_perplexity_is_no_number_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run")
    run.engine.evaluate = lambda batches: 1000.0  # type: ignore[method-assign]
    train(run, [Validation([], 0)])  # type: ignore[arg-type]
    run.close()
    values = read_log(tmp_path / "run")[8]
    assert (values["validation_loss"], values["validation_perplexity"]) == (1000.0, math.exp(700.0))
    assert "validation loss 1000.0000 | perplexity 1014232" in capsys.readouterr().out


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
