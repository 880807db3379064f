"""How often ranks ask each other whether one was told to stop, and when garbage is collected."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_iiet.config import RunConfig
from megatron_iiet.parallel import Group, ParallelContext
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.loop import GARBAGE_EVERY, train
from megatron_iiet.training.run import Run
from megatron_iiet.training.stopping import POLL_SECONDS, Poll, stop_if_asked
from tests.distributed.harness import run_ranks
from tests.training.bare_run import bare_run


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def of_two(clock: Clock) -> Poll:
    return Poll(Group((0, 1), 0, dist.GroupMember.NON_GROUP_MEMBER), clock)


def asked_at(poll: Poll, clock: Clock, seconds: list[float], slowest: float = 1.0) -> list[float]:
    """When the ranks ask at places so far apart; the other rank's are ``slowest`` times as far."""
    times, start = [], clock.now
    for apart in seconds:
        clock.now += apart
        if poll.due():
            times.append(round(clock.now - start, 3))
            poll.asked(slowest * poll.apart())
    return times


@pytest.mark.parametrize("apart", [0.01, 0.3, 1.9])
def test_ranks_ask_within_the_bound(apart: float) -> None:
    """Once at the start, then after one place, which tells how far apart they are."""
    clock = Clock()
    poll = of_two(clock)
    times = asked_at(poll, clock, [apart] * 1000)
    assert times[:2] == [round(apart, 3), round(2 * apart, 3)]
    gaps = [later - before for before, later in itertools.pairwise(times[1:])]
    assert max(gaps) <= POLL_SECONDS + 1e-3
    assert min(gaps) > POLL_SECONDS - apart - 1e-3


def test_after_a_long_step_they_ask_at_once() -> None:
    clock = Clock()
    assert asked_at(of_two(clock), clock, [5.0] * 4) == [5.0, 10.0, 15.0, 20.0]


def test_the_slowest_rank_says_how_often() -> None:
    clock = Clock()
    times = asked_at(of_two(clock), clock, [0.1] * 40, slowest=4.0)
    assert times[1:4] == [0.2, 0.7, 1.2]


def test_a_rank_alone_asks_at_every_place() -> None:
    clock = Clock()
    poll = Poll(Group(), clock)
    assert len(asked_at(poll, clock, [0.001] * 50)) == 50


def places_asked_at() -> list[int]:
    """Of a rank whose steps take as long as its number says."""
    with ParallelContext.start(RunConfig().parallel) as context:
        clock = Clock()
        poll, places = Poll(context.world, clock), []
        for place in range(60):
            clock.now += 0.125 * (1 + context.rank)
            if poll.due():
                stop_if_asked(context, None, poll)
                places.append(place)
        return places


@pytest.mark.slow
def test_ranks_of_different_speed_ask_at_the_same_places() -> None:
    """Eight of the slower one's steps are within the bound."""
    assert run_ranks(places_asked_at, 2) == [[0, 1, 9, 17, 25, 33, 41, 49, 57]] * 2


class Watched(Callback):
    """Notes whether Python may collect garbage of itself."""

    def __init__(self) -> None:
        self.enabled: list[bool] = []

    def on_step(self, run: Run, result: StepResult) -> None:
        self.enabled.append(gc.isenabled())


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_steps_only(enabled: bool, tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", training={"steps": 2 * GARBAGE_EVERY + 1})
    watched, collected = Watched(), []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and watched.enabled:
            collected.append(len(watched.enabled))

    gc.callbacks.append(note)
    (gc.enable if enabled else gc.disable)()
    try:
        assert train(run, [watched])
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
        gc.callbacks.remove(note)
        run.close()
    assert watched.enabled == [False] * (2 * GARBAGE_EVERY + 1)
    assert [step for step in collected if step % GARBAGE_EVERY == 0] == [GARBAGE_EVERY, 2 * GARBAGE_EVERY]
