"""The loss scale of fp16: moved as torch moves its own, kept from what is no overflow, gone on from."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from megatron_iiet.config.loss_scaling import LARGEST, complete, loss_scaling
from megatron_iiet.config.schema import GuardsConfig
from megatron_iiet.parallel.group import Group
from megatron_iiet.training.engine import Verdict
from megatron_iiet.training.engine.gate import Gate
from megatron_iiet.training.engine.loss_scale import LossScale

CPU = torch.device("cpu")


def scale(**section: Any) -> LossScale:
    return LossScale(loss_scaling({"fp16": complete(section, "ds.json")}), CPU, offloaded=False)


def verdict(value: Verdict) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_without_hysteresis_it_moves_as_torchs(window: int) -> None:
    """Over steps of which now many and now few overflow."""
    ours = scale(initial_scale_power=8, loss_scale_window=window, hysteresis=1, min_loss_scale=1e-37)
    theirs, tracker = torch.tensor(2.0**8), torch.zeros((), dtype=torch.int32)
    drawn, seen = random.Random(window), set()
    for step in range(300):
        overflows = drawn.random() < (0.6 if step // 30 % 2 else 0.05)
        torch._amp_update_scale_(theirs, tracker, torch.tensor(float(overflows)), 2.0, 0.5, window)
        ours.update(verdict(Verdict.OVERFLOW if overflows else Verdict.TRAINED))
        if theirs > LARGEST:  # ours has an end
            break
        assert ours.value == theirs, step
        seen.add(theirs.item())
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("consecutive", "scales"),
    [
        # Steps of which o overflows:     o    .    o    .    o    .    .    o    o
        (False, [16.0, 16.0, 8.0, 8.0, 4.0, 4.0, 8.0, 8.0, 4.0]),
        (True, [16.0, 16.0, 16.0, 16.0, 16.0, 16.0, 32.0, 32.0, 16.0]),
    ],
)
def test_hysteresis_is_used_up_and_restored(consecutive: bool, scales: list[float]) -> None:
    """By a doubling; or, if it is to be of overflows in a row, by any step without one."""
    keys = {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2}
    ours = scale(**keys, consecutive_hysteresis=consecutive)
    seen = []
    for step in "o.o.o..oo":
        ours.update(verdict(Verdict.OVERFLOW if step == "o" else Verdict.TRAINED))
        seen.append(ours.value.item())
    assert seen == scales


def test_what_is_no_matter_of_the_scale_does_not_move_it() -> None:
    ours = scale(loss_scale_window=1)
    before = ours.state()
    for each in (Verdict.NOT_FINITE, Verdict.SPIKE, Verdict.HELD, Verdict.LEFT_OUT):
        ours.update(verdict(each))
    assert ours.state() == before == {"scale": 65536.0, "steady": 0, "hysteresis": 2}


def test_it_stays_within_bounds() -> None:
    low = scale(initial_scale_power=2, min_loss_scale=3, hysteresis=1)
    high = scale(initial_scale_power=31, loss_scale_window=1)
    for _ in range(3):
        low.update(verdict(Verdict.OVERFLOW))
        high.update(verdict(Verdict.TRAINED))
    assert (low.value.item(), high.value.item()) == (3.0, LARGEST)
    assert not low.can_fall
    assert high.can_fall


def test_one_that_is_given_does_not_move() -> None:
    ours = scale(loss_scale=1024)
    ours.update(verdict(Verdict.OVERFLOW))
    ours.load({"scale": 2.0, "steady": 1, "hysteresis": 1})
    assert ours.value.item() == 1024.0
    assert not ours.can_fall


def test_it_goes_on_from_its_state() -> None:
    one, other = (scale(loss_scale_window=3, initial_scale_power=4) for _ in range(2))
    steps = [Verdict.OVERFLOW, Verdict.TRAINED, Verdict.OVERFLOW, Verdict.TRAINED, Verdict.TRAINED]
    for each in steps:
        one.update(verdict(each))
    other.load(one.state())
    for _ in range(3):
        for each in (one, other):
            each.update(verdict(Verdict.TRAINED))
        assert one.state() == other.state()
    assert one.value.item() == 16.0  # halved once, doubled once


def judged(gate: Gate, loss: float, norm: float) -> tuple[Verdict, float]:
    gate.begin(torch.tensor([loss], dtype=torch.float64))
    numbers = gate.decide(norm)
    gate.end()
    return Verdict(int(numbers[2])), float(numbers[3])


def test_an_overflow_is_no_matter_for_guards_until_the_scale_is_at_its_least() -> None:
    """Nor is it a spike; and a loss that is no number is none at any scale."""
    guards = GuardsConfig(nonfinite="stop", spike="rewind", window=2)
    gate = Gate(guards, Group(), CPU, scale(initial_scale_power=2, hysteresis=1))
    assert judged(gate, 5.0, 1.0) == judged(gate, 5.0, 1.0) == (Verdict.TRAINED, 4.0)
    assert judged(gate, 5.0, math.inf) == (Verdict.OVERFLOW, 4.0)
    assert judged(gate, 5.0, -1.0) == (Verdict.OVERFLOW, 2.0)
    assert judged(gate, 5.0, 1.0) == (Verdict.TRAINED, 1.0)
    assert judged(gate, 5.0, math.inf) == (Verdict.NOT_FINITE, 1.0)
    assert judged(gate, 5.0, 1.0) == (Verdict.HELD, 1.0)
    gate = Gate(guards, Group(), CPU, scale())
    assert judged(gate, math.nan, math.nan) == (Verdict.NOT_FINITE, 65536.0)


def test_a_second_look_moves_no_scale() -> None:
    ours = scale(hysteresis=1)
    gate = Gate(GuardsConfig(), Group(), CPU, ours)
    with gate.shut():
        assert judged(gate, 5.0, math.inf) == (Verdict.HELD, 65536.0)
    assert ours.value.item() == 65536.0
