"""What an fp16 run multiplies its loss by, so that its gradients are numbers that fp16 has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_iiet.config.loss_scaling import LARGEST, LossScaling
from megatron_iiet.training.engine.results import Verdict


class LossScale:
    """The scale and what moves it, on the device: no step waits to hear whether a gradient overflowed.

    As in Megatron-LM: a step with an overflow is left out, and halves the scale once the hysteresis is used
    up; ``window`` steps in a row without one double it and restore the hysteresis.
    """

    def __init__(self, settings: LossScaling, device: torch.device, *, offloaded: bool) -> None:
        self._settings = settings
        self.value = torch.tensor(settings.initial, dtype=torch.float32, device=device)
        """fp32 scalar, changed in place between steps."""
        self.at_optimizer = self.value.cpu() if offloaded else self.value
        """The same where the optimizer is."""
        self._steady = torch.zeros((), dtype=torch.int64, device=device)
        self._hysteresis = torch.full_like(self._steady, settings.hysteresis)

    @property
    def can_fall(self) -> Tensor:
        """Whether an overflow is a matter of the scale."""
        return self.value > (self._settings.least if self._settings.dynamic else torch.inf)

    @torch.no_grad()
    def update(self, verdict: Tensor) -> None:
        """A step is over, and its gradients are no longer needed."""
        settings = self._settings
        if not settings.dynamic:
            return
        overflow, trained = verdict == Verdict.OVERFLOW, verdict == Verdict.TRAINED
        left = self._hysteresis - overflow.long()
        steady = torch.where(overflow, 0, self._steady + trained.long())
        falls, rises = overflow & (left < 1), trained & (steady == settings.window)
        restored = rises | trained if settings.consecutive else rises
        factor = torch.where(falls, 0.5, torch.where(rises, 2.0, 1.0))
        self._steady.copy_(torch.where(rises, 0, steady))
        self._hysteresis.copy_(torch.where(restored, settings.hysteresis, left.clamp(min=1)))
        self._set(self.value * factor)

    def state(self) -> dict[str, Any]:
        """What the next step depends on; waits for the device."""
        return {
            "scale": self.value.item(),
            "steady": int(self._steady.item()),
            "hysteresis": int(self._hysteresis.item()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` told; a scale that does not change is the configuration's."""
        if self._settings.dynamic:
            self._steady.fill_(state["steady"])
            self._hysteresis.fill_(min(state["hysteresis"], self._settings.hysteresis))
            self._set(torch.full_like(self.value, state["scale"]))

    def _set(self, value: Tensor) -> None:
        self.value.copy_(value.clamp(self._settings.least, LARGEST))
        self.at_optimizer.copy_(self.value)
