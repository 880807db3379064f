"""The optimizers, each declared once, and the learning-rate schedule that all have. What a declaration builds
is in :mod:`megatron_iiet.training.optimizers`, a module of the kind's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_iiet.config.changes import BELOW_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Change, Range, key
from megatron_iiet.config.kinds import Declaration, Kinds, name_of_kind

COURSE = Change.COURSE
FEW = Range("lie between 1 and 20", least=1, most=20)


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
class WithAdamW(OptimizerConfig):
    """What moves some parameters, or all, by AdamW."""

    beta1: float = key(0.9, COURSE, BELOW_ONE)
    """First-moment decay of AdamW."""
    beta2: float = key(0.95, COURSE, BELOW_ONE)
    """Second-moment decay of AdamW."""
    eps: float = key(1.0e-8, COURSE, POSITIVE)
    """Denominator epsilon of AdamW."""


@dataclass
class AdamW(WithAdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind: str = name_of_kind("adamw")
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = key("auto", COURSE)
    """Whose AdamW: torch's fused one, apex.optimizers.FusedAdam (NVIDIA's apex, which is not on PyPI), or
    DeepSpeed's (FusedAdam, or its CPU Adam if it is offloaded; compiled at first use). auto: DeepSpeed's if
    the DeepSpeed JSON has an optimizer section, else torch's. A start says which it is."""

    def in_deepspeed(self) -> list[tuple[str, str, Any]]:
        return [
            ("type", "the run's optimizer", "AdamW"),
            ("params.lr", "optimizer.lr", self.lr),
            ("params.betas", "[optimizer.beta1, optimizer.beta2]", [self.beta1, self.beta2]),
            ("params.eps", "optimizer.eps", self.eps),
            ("params.weight_decay", "optimizer.weight_decay", self.weight_decay),
        ]


@dataclass
class Muon(WithAdamW):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for the layers' matrices:
    q, k, v, gate and up each on its own. Embedding, head, norms, biases and merge coefficients have AdamW."""

    kind: str = name_of_kind("muon")
    momentum: float = key(0.95, COURSE, BELOW_ONE)
    """Decay of the running mean of gradients (Nesterov's, as torch.optim.Muon has it)."""
    newton_schulz_steps: int = key(5, COURSE, FEW)
    """Iterations that orthogonalise, each three matrix products."""
    adjust_lr: Literal["match_rms_adamw", "original"] = key("match_rms_adamw", COURSE)
    """What the rate of an m x n matrix is multiplied by: 0.2 sqrt(max(m, n)), with which its steps are as
    large as AdamW's and one rate and weight decay serve both (Liu et al. 2025), or sqrt(max(1, m / n)), which
    asks for a matrix_lr_ratio."""
    matrix_lr_ratio: float = key(1.0, COURSE, POSITIVE)
    """Learning rate of the matrices of the layers over optimizer.lr, which is that of all else."""


OPTIMIZERS = Kinds("optimizer", "an optimizer", (AdamW, Muon), default=AdamW)
