"""Whether an optimizer may step, decided on the device before it does and in one place for every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_iiet.config.schema import GuardsConfig
from megatron_iiet.parallel import Group
from megatron_iiet.training.engine.loss_scale import LossScale
from megatron_iiet.training.engine.results import Verdict


class Gate:
    """Judges every step by its loss and gradient norm, without waiting for the device; the same on all ranks.

    A step that is left out leaves weights, moments and the optimizer's step count as they were. After one
    that ends the run or sends it back, all are, until :meth:`open`: what follows it was not asked for.
    """

    def __init__(
        self, guards: GuardsConfig, world: Group, device: torch.device, scale: LossScale | None = None
    ) -> None:
        """``scale``: that of an fp16 run, by which its gradients may overflow."""
        self._guards = guards
        self._scale = scale
        self._world = world
        self._device = device
        self._recent: Tensor | None = None
        """Loss and norm of the last steps that trained, [window, 2], the newest last; before them NaN."""
        if guards.spike != "off":
            self._recent = torch.full((guards.window, 2), math.nan, dtype=torch.float64, device=device)
        self._held = torch.zeros((), dtype=torch.bool, device=device)
        self._unseen = torch.zeros((), device=device)
        """0, or no number if a gradient was none that no norm has."""
        self._shut = False
        self._numbers: Tensor | None = None
        self._decided: Tensor | None = None

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Judge steps also by the gradients that this rank computes of these, which the norm leaves out: of
        what tensor-parallel ranks all hold, it has the first one's."""

        def note(gradient: Tensor) -> None:
            self._unseen += (gradient.detach() * 0).sum()

        for parameter in parameters:
            parameter.register_hook(note)

    def begin(self, numbers: Tensor) -> None:
        """A step is about to be decided; ``numbers``: its loss and the terms of it, fp64 [1 + terms]."""
        self._numbers, self._decided = numbers, None

    @torch.no_grad()
    def decide(self, norm: Tensor | float) -> Tensor:
        """Loss, norm, verdict, loss scale or NaN, and terms of this step, fp64 [4 + terms]; decided the first
        time. A norm below 0 is one that DeepSpeed could not compute. Every rank calls it."""
        if self._decided is None:
            assert self._numbers is not None, "no step was begun"
            norm = torch.as_tensor(norm, dtype=torch.float64).to(self._device).reshape(())
            norm = torch.where(norm < 0, math.inf, norm)
            seen = torch.stack((self._numbers[0], norm))
            verdict = torch.full_like(norm, Verdict.HELD) if self._shut else self._judge(seen)
            self._unseen.zero_()
            scale = verdict.new_full((), math.nan) if self._scale is None else self._scale.value.double()
            self._decided = torch.cat((seen, torch.stack((verdict, scale)), self._numbers[1:]))
        return self._decided

    def end(self) -> None:
        """The step is over: its gradients were used as they were scaled."""
        if self._scale is not None:
            assert self._decided is not None, "no step was decided"
            self._scale.update(self._decided[2])

    def _judge(self, seen: Tensor) -> Tensor:
        """The verdict on loss and norm [2]."""
        finite = seen.isfinite().all() & self._unseen.isfinite()
        spike = torch.zeros_like(finite)
        if self._recent is not None:  # NaN, as long as the window is not full, is above nothing
            deviation, mean = torch.std_mean(self._recent, dim=0)
            spike = (seen > mean + self._guards.deviations * deviation).any()
        # Replicas could differ in a last bit, and must not in what they do.
        votes = torch.stack((~finite, spike, ~seen[0].isfinite())).to(torch.float64)
        self._world.all_reduce(votes)
        no_number, spike, no_loss = votes.gt(0).unbind()
        spike = spike & ~no_number
        overflow = torch.zeros_like(no_number)
        if self._scale is not None:  # a loss that is no number is none at any scale
            overflow = no_number & ~no_loss & self._scale.can_fall
        no_number = no_number & ~overflow
        ends = no_number if self._guards.nonfinite == "stop" else torch.zeros_like(no_number)
        if self._guards.spike == "rewind":
            ends = ends | spike
        verdict = torch.where(spike, Verdict.SPIKE, Verdict.TRAINED)
        verdict = torch.where(no_number, Verdict.NOT_FINITE, verdict)
        verdict = torch.where(overflow, Verdict.OVERFLOW, verdict)
        verdict = torch.where(self._held, Verdict.HELD, verdict)
        self._held = self._held | ends
        if self._recent is not None:
            moved = torch.cat((self._recent[1:], seen.reshape(1, 2)))
            self._recent = torch.where(verdict > 0, self._recent, moved)
        return verdict.to(torch.float64)

    def open(self, recent: Sequence[tuple[float, float]]) -> None:
        """Let steps through again; ``recent``: loss and norm of the last ones that trained, oldest first."""
        self._held = torch.zeros_like(self._held)
        if self._recent is not None:
            self._recent.fill_(math.nan)
            last = list(recent)[-len(self._recent) :]
            if last:
                self._recent[-len(last) :] = torch.tensor(last, dtype=torch.float64)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Let no step in the block through, and learn nothing from it."""
        self._shut = True
        try:
            yield
        finally:
            self._shut = False

    def guard(self, optimizer: Any, norm: Callable[[], Tensor | float], *, offloaded: bool) -> None:
        """Have an optimizer step only where the verdict lets it.

        torch's fused ones read a flag on the device, and leave tensors and step count alone. Another is not
        called, which waits for the device in every step.
        """
        step = optimizer.step
        reads_flag = bool(optimizer.defaults.get("fused"))

        def guarded(*args: Any, **kwargs: Any) -> Any:
            left_out = self.decide(norm())[2].gt(0).to(torch.float32)
            if not reads_flag:
                return None if left_out.item() else step(*args, **kwargs)
            # torch would copy it in the background, and read it before it is there.
            optimizer.found_inf = left_out.cpu() if offloaded else left_out
            return step(*args, **kwargs)

        optimizer.step = guarded
