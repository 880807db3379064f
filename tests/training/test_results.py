"""Numbers of steps that stay on the device until one is asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_iiet.training.engine import StepResult, Verdict, results
from megatron_iiet.training.engine.results import OwnTime, Ring


def put(ring: Ring, step: int) -> StepResult:
    numbers = torch.tensor([step + 0.5, 10.0 * step, float(step % 3), 2.0**step, 100.0 + step])
    return ring.put(numbers, ("mse",), 1e-3 * step)


def test_one_that_is_asked_reads_all() -> None:
    ring = Ring(at_once=False)
    steps = [put(ring, step) for step in range(4)]
    assert not any(step.is_read for step in steps)
    assert steps[1].lr == 1e-3, "which the host knows"
    assert steps[2].grad_norm == 20.0
    assert all(step.is_read for step in steps)
    assert [(step.loss, step.grad_norm, step.verdict, step.loss_scale, step.parts) for step in steps] == [
        (0.5, 0.0, Verdict.TRAINED, 1.0, {"mse": 100.0}),
        (1.5, 10.0, Verdict.NOT_FINITE, 2.0, {"mse": 101.0}),
        (2.5, 20.0, Verdict.SPIKE, 4.0, {"mse": 102.0}),
        (3.5, 30.0, Verdict.TRAINED, 8.0, {"mse": 103.0}),
    ]
    for ask in ("loss", "grad_norm", "verdict", "loss_scale", "parts", "read"):
        step = put(ring, 5)
        found = getattr(step, ask)
        assert (found() if ask == "read" else found) is not step
        assert step.is_read, ask
    ring.read()  # of none


def test_where_it_is_no_wait_every_step_is_read() -> None:
    assert put(Ring(at_once=True), 1).is_read


def test_no_more_wait_than_the_device_should_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_MOST_WAITING", 3)
    ring = Ring(at_once=False)
    steps = [put(ring, step) for step in range(5)]
    assert [step.is_read for step in steps] == [True] * 3 + [False] * 2


def test_a_result_that_is_given() -> None:
    step = StepResult(5.0, 1.0, 0.1, {"kl": 2.0}, Verdict.SPIKE)
    assert step.is_read
    assert (step.loss, step.grad_norm, step.lr, step.parts) == (5.0, 1.0, 0.1, {"kl": 2.0})
    assert step.verdict is Verdict.SPIKE
    empty = StepResult()
    assert all(map(math.isnan, (empty.loss, empty.grad_norm, empty.lr, empty.loss_scale)))
    assert (empty.parts, empty.verdict) == ({}, Verdict.TRAINED)


def test_own_time_adds_up_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's clock; on a GPU between events, which are read when it is asked, or are too many."""
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    here = OwnTime(torch.device("cpu"))
    for seconds, blocks in ((6.0, 2), (1.0, 1), (0.0, 0)):
        for _ in range(blocks):
            with here.counted():
                pass
        assert here.take() == seconds

    clock, waited = [0], list[int]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            clock[0] += 1
            self.at = clock[0]

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: Any) -> float:
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(results, "_MOST_WAITING", 3)
    there = OwnTime(torch.device("cuda"))
    for number in range(4):
        with there.counted():
            clock[0] += number
        assert waited == ([] if number < 2 else [3 - 1, 3 + 2, 3 + 6])
    assert there.take() == 4 + 0 + 1 + 2 + 3
    assert there.take() == 0.0
