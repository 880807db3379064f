"""The thread that runs the batch: whose turn it is, who leaves, and what a failure costs whom."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_iiet.serving.batch import Batch
from megatron_iiet.serving.continuation import Continuation, Order, Update
from megatron_iiet.serving.engine import BusyError, Engine
from tests.serving.test_batch import CODEC, CONTEXT, alone, any_model, prompts

PATIENCE = 60.0


class Heard:
    """A sequence whose news come from another thread."""

    def __init__(self, prompt: list[int], count: int, codec: Any = CODEC) -> None:
        self.news: queue.Queue[Update] = queue.Queue()
        self.of = Continuation(Order(prompt, count), codec, self.news.put)

    def next(self) -> Update:
        return self.news.get(timeout=PATIENCE)

    def end(self) -> Update:
        while not ((update := self.next()).finish or update.error):
            pass
        return update


def started(places: int, max_waiting: int, codec: Any = CODEC) -> Engine:
    engine = Engine(
        Batch(any_model("iiet-plan"), codec, places=places, context=CONTEXT), max_waiting=max_waiting
    )
    engine.start()
    return engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = started(places=2, max_waiting=2)
    yield engine
    engine.stop()


class Gate:
    """A tokenizer's decode that waits, once for each token, until it may go on."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)

    def __call__(self, ids: list[int]) -> str:
        assert self.open.acquire(timeout=PATIENCE)
        return CODEC.decode(ids)


def test_everyone_gets_a_turn(engine: Engine) -> None:
    heard = [Heard(prompt, 5 + n) for n, prompt in enumerate(prompts(3, 9, 4, 6))]
    engine.submit([each.of for each in heard])
    for each in heard:
        assert each.end().finish == "length"
        expected, _ = alone(engine.batch.model, each.of.order.prompt, each.of.order.max_tokens)
        assert each.of.tokens == expected
    last = Heard(prompts(2)[0], 2)
    engine.submit([last.of])
    assert last.end().finish == "length"
    assert engine.load == (0, 0)


def test_no_more_wait_than_may(engine: Engine) -> None:
    """All of a request or nothing of it; whoever leaves makes room, running or waiting."""
    rows = prompts(*[3] * 6)
    with pytest.raises(BusyError):
        engine.submit([Heard(row, 3).of for row in rows[:5]])
    assert engine.load == (0, 0)
    running = [Heard(row, 61) for row in rows[:2]]
    engine.submit([each.of for each in running])
    running[0].next()
    waiting = [Heard(row, 3) for row in rows[2:4]]
    engine.submit([each.of for each in waiting])
    late = Heard(rows[4], 3)
    if engine.load == (2, 2):  # unless the first ones are done already
        with pytest.raises(BusyError):
            engine.submit([late.of])
    for each in (running[0], waiting[0]):
        each.of.cancel()
    assert waiting[1].end().finish == "length"
    engine.submit([late.of])
    assert late.end().finish == running[1].end().finish == "length"
    assert not any(update.finish for update in waiting[0].news.queue)


def test_who_is_cancelled_leaves_at_the_next_token() -> None:
    gate = Gate()
    gate.open.release(1)  # for the prompt
    engine = started(1, 1, dataclasses.replace(CODEC, decode=gate))
    heard = Heard(prompts(3)[0], 50, dataclasses.replace(CODEC, decode=gate))
    engine.submit([heard.of])
    gate.open.release(2)  # each token that is text is decoded as new and as known
    assert heard.next().text
    heard.of.cancel()
    gate.open.release(100)
    other = Heard(prompts(4)[0], 2)
    engine.submit([other.of])
    assert other.end().finish == "length"
    assert len(heard.of.tokens) <= 3
    engine.stop()


@pytest.mark.slow
def test_a_prompt_that_fails_is_alone_in_that(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = Heard(prompts(3)[0], 40), Heard([10**6], 3)
    engine.submit([good.of])
    good.next()
    engine.submit([bad.of])
    assert bad.end().error == "the model failed (IndexError); the server's own output has more"
    assert good.end().finish == "length"
    assert good.of.tokens == alone(engine.batch.model, good.of.order.prompt, 40)[0]
    assert "index out of range" in capfd.readouterr().err


def test_a_step_that_fails_ends_who_runs_and_nobody_else(capfd: pytest.CaptureFixture[str]) -> None:
    """As a step would that has too little memory; here it is the tokenizer that can't."""
    made, _ = alone(any_model("iiet-plan"), prompts(3)[0], 3)

    def decode(ids: list[int]) -> str:
        if made[2] in ids and broken:
            raise MemoryError("too little")
        return CODEC.decode(ids)

    broken = [True]
    codec = dataclasses.replace(CODEC, decode=decode)
    engine = started(1, 2, codec)
    bad, waits = (Heard(prompts(3)[0], 10, codec) for _ in range(2))
    engine.submit([bad.of])
    assert bad.end().error == "the model failed (MemoryError); the server's own output has more"
    broken.clear()
    engine.submit([waits.of])
    assert waits.end().finish == "length"
    assert waits.of.tokens == alone(engine.batch.model, prompts(3)[0], 10)[0]
    engine.stop()
    assert "too little" in capfd.readouterr().err


def test_a_stop_ends_everyone() -> None:
    engine = started(1, 3)
    heard = [Heard(row, 61) for row in prompts(3, 3, 3)]
    engine.submit([each.of for each in heard])
    heard[0].next()
    engine.stop()
    ends = [each.end() for each in heard]
    assert ends[-1].error == "the server stops"
    assert not engine.alive
    with pytest.raises(BusyError):
        engine.submit([Heard([3], 1).of])
