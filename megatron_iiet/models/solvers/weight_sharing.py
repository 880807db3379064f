"""Explicit Euler over a deeper stack whose neighbouring layers share their weights."""

from __future__ import annotations

from torch import Tensor

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Solver
from megatron_iiet.ops import merge_norm


class WeightSharing(Solver[solvers.WeightSharing]):
    """k Euler steps in a row with the weights of one layer (Trans WS in the IIET paper, arXiv 2509.22463):
    a Transformer++ N·k layers deep with the parameters of N::

        y^0 = y_n,  y^i = y^{i-1} + F(y^{i-1}) for i = 1..k,  y_{n+1} = y^k
    """

    keeps = False

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        norm = increment_fn.input_norm
        f = increment_fn(y_BTD, None, 0)
        for i in range(1, self.declared.repeats):
            y_BTD, normed = merge_norm(
                y_BTD, (f,), None, norm.weight, eps=norm.eps, backend=self.place.backend
            )
            f = increment_fn(y_BTD, normed, i)
        return y_BTD + f, f
