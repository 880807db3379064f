"""The optimizers, each declared once, and the learning-rate schedule that all have. What a declaration builds
is in :mod:`megatron_iiet.training.optimizers`, a module of the kind's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_iiet.config.changes import BELOW_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Change, key
from megatron_iiet.config.kinds import Declaration, Kinds, name_of_kind

COURSE = Change.COURSE


@dataclass
class OptimizerConfig(Declaration):
    """How parameters move, and how far in which step."""

    lr: float = key(3.0e-4, COURSE, POSITIVE)
    """Peak learning rate."""
    min_lr_ratio: float = key(0.1, COURSE, FRACTION)
    """Final learning rate as a share of the peak."""
    warmup_fraction: float = key(0.05, COURSE, BELOW_ONE)
    """Share of the steps with linear warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key("cosine", COURSE)
    """Shape after warm-up: down to the final rate along a cosine or a line, constant, or wsd: stable, then
    down a line over the last decay_fraction of the steps. A run resumed in its stable phase may be given more
    training.steps: its rate stays what it was."""
    decay_fraction: float = key(0.1, COURSE, BELOW_ONE)
    """Share of the steps, the last ones, in which the rate of schedule wsd falls."""
    weight_decay: float = key(0.01, COURSE, NOT_NEGATIVE)
    """Decoupled weight decay; never applied to norms, biases and merge coefficients."""
    gradient_clipping: float = key(1.0, COURSE, NOT_NEGATIVE)
    """Largest global gradient norm; 0 turns clipping off."""

    def in_deepspeed(self) -> list[tuple[str, str, Any]] | None:
        """Key of an ``optimizer`` section of a DeepSpeed JSON, what we call it, and the value that it must
        have, for each; None if DeepSpeed has no such optimizer."""
        return None


@dataclass
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind: str = name_of_kind("adamw")
    beta1: float = key(0.9, COURSE, BELOW_ONE)
    """First-moment decay."""
    beta2: float = key(0.95, COURSE, BELOW_ONE)
    """Second-moment decay."""
    eps: float = key(1.0e-8, COURSE, POSITIVE)
    """Denominator epsilon."""

    def in_deepspeed(self) -> list[tuple[str, str, Any]]:
        return [
            ("type", "the run's optimizer", "AdamW"),
            ("params.lr", "optimizer.lr", self.lr),
            ("params.betas", "[optimizer.beta1, optimizer.beta2]", [self.beta1, self.beta2]),
            ("params.eps", "optimizer.eps", self.eps),
            ("params.weight_decay", "optimizer.weight_decay", self.weight_decay),
        ]


OPTIMIZERS = Kinds("optimizer", "an optimizer", (AdamW,), default=AdamW)
