"""Explicit Euler: the plain Transformer++."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import LAYER_NORM_EPS, IncrementFn, Solver, euler_step


class Euler(Solver):
    """``y_{n+1} = y_n + F(y_n)``, a LLaMA layer (Touvron et al. 2023)."""

    def __init__(self, width: int = 0, output_norm: str = "none") -> None:
        """``output_norm``: ``layer`` for ``y_{n+1} = LN(y_n + F(y_n))``, [width]: the normalised control of
        :class:`ReleasedImplicitEuler`, which has no stream that is not."""
        super().__init__()
        self.output_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if output_norm == "layer" else None

    @property
    def keeps_increment(self) -> bool:
        return False

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        y_BTD, f_BTD = euler_step(y_BTD, increment_fn)
        return (y_BTD if self.output_norm is None else self.output_norm(y_BTD)), f_BTD
