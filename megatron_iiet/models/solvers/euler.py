"""Explicit Euler: the plain Transformer++, and the same over a deeper stack whose neighbouring layers share
their weights."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import LAYER_NORM_EPS, IncrementFn, Place, Solver, euler_step


class Euler(Solver[solvers.Euler]):
    """``y_{n+1} = y_n + F(y_n)``, a LLaMA layer (Touvron et al. 2023).

    ``output_norm='layer'`` is ``y_{n+1} = LN(y_n + F(y_n))``: the normalised control of
    :class:`ReleasedImplicitEuler`, which has no stream that is not.
    """

    keeps = False

    def __init__(self, declared: solvers.Euler, place: Place) -> None:
        super().__init__(declared, place)
        normed = declared.output_norm == "layer"
        self.output_norm = nn.LayerNorm(place.width, eps=LAYER_NORM_EPS) if normed else None

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        y_BTD, f_BTD = euler_step(y_BTD, increment_fn)
        return (y_BTD if self.output_norm is None else self.output_norm(y_BTD)), f_BTD


class WeightSharing(Solver[solvers.WeightSharing]):
    """k Euler steps in a row with the weights of one layer (Trans WS in the IIET paper, arXiv 2509.22463):
    a Transformer++ N·k layers deep with the parameters of N::

        y^0 = y_n,  y^i = y^{i-1} + F(y^{i-1}) for i = 1..k,  y_{n+1} = y^k
    """

    keeps = False

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        f = increment_fn(y_BTD, None, 0)
        for i in range(1, self.declared.repeats):
            y_BTD, normed = increment_fn.input_of(y_BTD, (f,), None)
            f = increment_fn(y_BTD, normed, i)
        return y_BTD + f, f
