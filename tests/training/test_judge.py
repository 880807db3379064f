"""Which rank is blamed for what, from pulses alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_iiet.config.timeouts import Timeouts
from megatron_iiet.training.judge import Judge, Pulse, Verdict
from megatron_iiet.training.progress import AT_LEAST_SECONDS, Activity, Progress
from megatron_iiet.training.watchdog import Elapsed

GROUP = "1 data"


class Ranks:
    """Pulses second by second, as the main rank reads them."""

    def __init__(self, number: int, timeouts: Timeouts, activity: Activity = Activity.STEP) -> None:
        progress = Progress(timeouts)
        progress.begin(activity, 7)
        self.judge = Judge(progress, 1.0)
        self.pulses = {
            rank: Pulse(f"host{rank}", 100 + rank, 0, activity=activity, step=7, place="plain.py:1 (f)")
            for rank in range(number)
        }
        self.now = 0.0
        self.warnings: list[str] = []

    def change(self, rank: int, **values: object) -> None:
        self.pulses[rank] = replace(self.pulses[rank], **values)  # type: ignore[arg-type]

    def run(
        self, seconds: int, *, silent: tuple[int, ...] = (), stuck: tuple[int, ...] = ()
    ) -> Verdict | None:
        for _ in range(seconds):
            self.now += 1.0
            for rank, pulse in self.pulses.items():
                if rank not in silent:
                    self.change(rank, beat=pulse.beat + 1)
                if rank not in silent + stuck:
                    self.change(rank, count=pulse.count + 1)
            verdict = self.judge.look(self.pulses, self.now)
            if self.judge.warning:
                self.warnings.append(self.judge.warning)
            if verdict is not None:
                return verdict
        return None


def test_nobody_is_blamed_while_all_get_on() -> None:
    ranks = Ranks(3, Timeouts(step=10))
    assert ranks.run(1000) is None
    assert ranks.warnings == []


def test_a_silent_rank_is_named_though_the_others_stand_still_too() -> None:
    ranks = Ranks(3, Timeouts(step=10))
    ranks.run(5)
    verdict = ranks.run(100, silent=(2,), stuck=(0, 1))
    assert verdict is not None
    assert ranks.now == 15.0
    assert verdict.sentence == (
        "rank 2 (process 102 on host2) gave no sign of life for 10 s in step 7: it is stopped, or its host "
        "is gone (the bound is 10 s, parallel.timeouts.step)"
    )
    assert verdict.silent == (ranks.pulses[2],)
    assert ranks.warnings == [
        "rank 2 (process 102 on host2) gave no sign of life for 5 s in step 7: it is stopped, or its host is "
        "gone; the run will end unless it goes on (the bound is 10 s, parallel.timeouts.step)"
    ]


def test_a_silent_rank_is_found_during_a_save_by_the_bound_of_a_step() -> None:
    ranks = Ranks(2, Timeouts(step=10, save=1000), Activity.SAVE)
    verdict = ranks.run(2000, silent=(1,), stuck=(0,))
    assert verdict is not None
    assert "rank 1 " in verdict.sentence
    assert ranks.now < 15


def test_a_rank_that_was_last_heard_in_its_start_is_found_by_the_bound_of_a_step() -> None:
    ranks = Ranks(2, Timeouts(start=1000, step=10))
    ranks.change(1, activity=Activity.START)
    verdict = ranks.run(2000, silent=(1,), stuck=())
    assert verdict is not None
    assert "rank 1 " in verdict.sentence
    assert ranks.now < 15


def test_validation_takes_its_time_but_is_not_silent() -> None:
    ranks = Ranks(2, Timeouts(start=100, step=10), Activity.BETWEEN)
    assert ranks.run(90, stuck=(0, 1)) is None
    verdict = ranks.run(20, silent=(1,), stuck=(0,))
    assert verdict is not None
    assert "rank 1 " in verdict.sentence
    assert ranks.now <= 100


def test_a_start_may_be_silent_as_long_as_it_may_take() -> None:
    ranks = Ranks(2, Timeouts(start=50, step=10), Activity.START)
    assert ranks.run(40, silent=(1,), stuck=(0,)) is None
    verdict = ranks.run(40, silent=(1,), stuck=(0,))
    assert verdict is not None
    assert "rank 1 " in verdict.sentence


def test_a_rank_that_lives_but_does_not_get_on_is_named_by_what_the_others_wait_for() -> None:
    ranks = Ranks(3, Timeouts(step=10))
    ranks.change(0, waits=True)
    ranks.change(1, place="batches.py:5 (next)")
    ranks.change(2, waits=True)
    verdict = ranks.run(100, stuck=(0, 1, 2))
    assert verdict is not None
    assert verdict.sentence.startswith(
        "rank 1 (process 101 on host1) got no further for 10 s in step 7: it is at batches.py:5 (next), and "
        "the others wait for it"
    )
    assert verdict.silent == ()


def test_where_nobody_is_seen_waiting_the_fewest_collectives_tell() -> None:
    """As on a GPU, whose collectives are waited for in any call."""
    ranks = Ranks(3, Timeouts(step=10))
    for rank, begun in enumerate((42, 42, 41)):
        ranks.change(rank, collectives={GROUP: begun})
    verdict = ranks.run(100, stuck=(0, 1, 2))
    assert verdict is not None
    assert verdict.sentence.startswith("rank 2 (process 102 on host2) got no further for 10 s in step 7")
    assert "has begun 41 collectives of process group 1 data, others 42" in verdict.sentence


def test_all_that_wait_for_each_other_are_not_blamed_on_one() -> None:
    ranks = Ranks(2, Timeouts(step=10))
    for rank in range(2):
        ranks.change(rank, waits=True, collectives={GROUP: 5})
    verdict = ranks.run(100, stuck=(0, 1))
    assert verdict is not None
    assert verdict.sentence.startswith("all ranks wait for each other for 10 s in step 7, the first at plain")


def test_a_missed_beat_is_no_silence() -> None:
    ranks = Ranks(2, Timeouts(step=2))
    for _ in range(10):
        assert ranks.run(1, silent=(1,)) is None
        assert ranks.run(1) is None


def test_the_bound_of_a_step_is_learned() -> None:
    now = 0.0
    progress = Progress(Timeouts(), data_timeout=300.0, clock=lambda: now)
    assert progress.silence == AT_LEAST_SECONDS
    assert progress.bound(Activity.STEP) == 360.0  # its data may take 300
    for step, seconds in enumerate((20.0, 60.0, 30.0)):
        progress.begin(Activity.STEP, step)
        now += seconds
        progress.begin(Activity.START, step)
        now += 1000.0  # what is not a step counts for nothing
    assert progress.silence == progress.bound(Activity.STEP) == 600.0
    assert "learned from steps of up to 60 s" in progress.why(Activity.STEP)
    for step in range(66):  # of the last 64
        progress.begin(Activity.STEP, step)
        now += 40.0
    assert progress.silence == 400.0


def test_a_save_within_another_activity_returns_to_it() -> None:
    progress = Progress()
    progress.begin(Activity.STEP, 3)
    with progress.at(Activity.SAVE):
        assert progress.now[:2] == (Activity.SAVE, 3)
    assert progress.now[:2] == (Activity.STEP, 3)


def test_what_stands_with_its_process_is_not_late() -> None:
    times = iter((0.0, 1.0, 2.5, 3602.5, 3603.5))
    clock = Elapsed(2.0, lambda: next(times))
    assert [clock.tick() for _ in range(4)] == pytest.approx([1.0, 2.5, 4.5, 5.5])
