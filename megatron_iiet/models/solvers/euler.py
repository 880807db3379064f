"""Explicit Euler: the plain Transformer++."""

from __future__ import annotations

from torch import Tensor

from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Solver, euler_step


class Euler(Solver):
    """``y_{n+1} = y_n + F(y_n)``, a LLaMA layer (Touvron et al. 2023)."""

    @property
    def keeps_increment(self) -> bool:
        return False

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        return euler_step(y_BTD, increment_fn)
