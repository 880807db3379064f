"""What optimizer steps did, as numbers that stay on the device until somebody asks for one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_MOST_WAITING = 256
"""Steps after which a ring is read though nobody asked: each holds a tensor of the device."""


class Verdict(IntEnum):
    """Whether a step moved the model, and if not, why."""

    TRAINED = 0
    NOT_FINITE = 1
    """Its loss or gradient was no number."""
    SPIKE = 2
    """Its loss or gradient norm was far above those of the steps before."""
    HELD = 3
    """An earlier step ends the run, which is not known yet where the numbers are read later."""
    LEFT_OUT = 4
    """Its samples are not trained on: nothing was computed."""
    OVERFLOW = 5
    """A gradient was no number at an fp16 run's loss scale, which is lowered."""


class StepResult:
    """What one optimizer step did. Asking for a number that is still on the device reads all that are."""

    def __init__(
        self,
        loss: float = math.nan,
        grad_norm: float = math.nan,
        lr: float = math.nan,
        parts: Mapping[str, float] | None = None,
        verdict: Verdict = Verdict.TRAINED,
        *,
        loss_scale: float = math.nan,
        ring: Ring | None = None,
    ) -> None:
        """``ring``: what has the numbers; None where they are given."""
        self.lr = lr
        """Learning rate of the step."""
        self._ring = ring
        self._loss = loss
        self._grad_norm = grad_norm
        self._verdict = verdict
        self._loss_scale = loss_scale
        self._parts = dict(parts or {})

    @property
    def is_read(self) -> bool:
        """Whether its numbers are here."""
        return self._ring is None

    @property
    def loss(self) -> float:
        """What was minimised: mean cross-entropy in nats per token over the global batch's targets, and
        whatever distillation adds."""
        self.read()
        return self._loss

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping."""
        self.read()
        return self._grad_norm

    @property
    def parts(self) -> dict[str, float]:
        """Terms of a loss that has several, unweighted, by name."""
        self.read()
        return self._parts

    @property
    def verdict(self) -> Verdict:
        """Whether it moved the model."""
        self.read()
        return self._verdict

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by; NaN where it is not fp16's."""
        self.read()
        return self._loss_scale

    def take(self, numbers: Sequence[float], names: Sequence[str]) -> None:
        """Have the numbers of the gate: loss, norm, verdict, loss scale, and the terms of the loss of these
        names."""
        self._loss, self._grad_norm, verdict, self._loss_scale, *parts = numbers
        self._verdict, self._parts = Verdict(int(verdict)), dict(zip(names, parts, strict=True))
        self._ring = None

    def read(self) -> None:
        """Have the numbers here, and those of all steps before."""
        if self._ring is not None:
            self._ring.read()


class OwnTime:
    """Seconds that this rank needs for itself, between waits for others: reading data and running forward.

    On a GPU they are between events that are read later. A rank that is waited for within a forward pass, by
    a neighbour in tensor parallelism or under ZeRO-3, makes the others' longer too.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What is done inside the block counts."""
        if not self._on_device:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._pairs.append(pair)
        if len(self._pairs) == _MOST_WAITING:
            self._read()

    def take(self) -> float:
        """The seconds since this was asked last."""
        self._read()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _read(self) -> None:
        pairs, self._pairs = self._pairs, []
        for first, last in pairs:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000


class Ring:
    """Numbers of the last steps on the device; reading them waits for it once, however many they are."""

    def __init__(self, *, at_once: bool) -> None:
        """``at_once``: read every step, where that is no wait."""
        self.at_once = at_once
        self._waiting: list[tuple[StepResult, Tensor, Sequence[str]]] = []

    def put(self, numbers: Tensor, names: Sequence[str], lr: float) -> StepResult:
        """The result of a step whose numbers are ``numbers``, see :meth:`StepResult.take`."""
        result = StepResult(lr=lr, ring=self)
        self._waiting.append((result, numbers, names))
        if self.at_once or len(self._waiting) == _MOST_WAITING:
            self.read()
        return result

    def read(self) -> None:
        """Give every step its numbers."""
        waiting, self._waiting = self._waiting, []
        rows = torch.stack([numbers for _, numbers, _ in waiting]).tolist() if waiting else []
        for (result, _, names), row in zip(waiting, rows, strict=True):
            result.take(row, names)
