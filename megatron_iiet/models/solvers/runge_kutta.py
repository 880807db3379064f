"""Explicit Runge-Kutta steps of order 2 and 4: the ODE Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Place, Solver, fp32_parameter
from megatron_iiet.ops import merge_norm

STEP_LENGTHS = {2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""By order: how far along the stage before the stages after the first are evaluated."""


class RungeKutta(Solver[solvers.RungeKutta2]):
    """Runge-Kutta of order o = 2 or 4 (ODE Transformer, Li et al. 2022, arXiv 2203.09176)::

        F_1 = F(y_n),  F_2 = F(y_n + F_1)                                                    o = 2
        F_1 = F(y_n),  F_2 = F(y_n + F_1/2),  F_3 = F(y_n + F_2/2),  F_4 = F(y_n + F_3)      o = 4
        y_{n+1} = y_n + Σ_i γ_i F_i

    ``stage_coefficients``: ``fixed`` has the classic γ (1/2, 1/2; 1/6, 1/3, 1/3, 1/6); ``learned`` starts at
    1, 1 (order 2) or the classic ones (order 4); ``full`` learns them, and at what a stage is evaluated
    (Eq. 4 of the IIET paper), β_ij from the classic method::

        F_i = F(y_n + Σ_{j<i} β_ij F_j)

    ``gated`` (order 2) computes the weights for every token::

        g = sigmoid(W [F_1; F_2] + b),  y_{n+1} = y_n + g F_1 + (1 - g) F_2

    with W [1, 2d] and b [1] that start at 0 and g at 1/2, the classic step. Like a norm's weight they are
    whole on each tensor-parallel rank and not decayed.
    """

    keeps = False

    def __init__(self, declared: solvers.RungeKutta2, place: Place) -> None:
        super().__init__(declared, place)
        order, stage_coefficients, width = declared.order, declared.stage_coefficients, place.width
        assert order == 2 or stage_coefficients != "gated"
        self.coefficients = self.inner_coefficients = self.gate_weight = self.gate_bias = None
        if stage_coefficients == "full":
            rows = [F.pad(torch.tensor([length]), (i, 0)) for i, length in enumerate(STEP_LENGTHS[order])]
            self.inner_coefficients = fp32_parameter(torch.cat(rows))  # β_21, β_31, β_32, β_41 …
        if stage_coefficients in ("learned", "full"):
            self.coefficients = fp32_parameter(torch.ones(2) if order == 2 else classic_weights(order))
        elif stage_coefficients == "gated":
            # Of the solver itself and no nn.Linear: ZeRO-3 gathers what belongs to the module that runs.
            self.gate_weight = nn.Parameter(torch.zeros(1, 2 * width))
            self.gate_bias = nn.Parameter(torch.zeros(1))

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        order, backend = self.declared.order, self.place.backend
        stages = evaluate_stages(order, y_BTD, increment_fn, self.inner_coefficients)
        if self.gate_weight is not None:
            first_BTD, second_BTD = stages
            of_first, of_second = self.gate_weight.chunk(2, dim=1)  # saves a copy of both stages side by side
            logits_BT1 = F.linear(first_BTD, of_first, self.gate_bias) + F.linear(second_BTD, of_second)
            return y_BTD + torch.lerp(second_BTD, first_BTD, logits_BT1.sigmoid()), second_BTD
        weights = classic_weights(order, y_BTD.device)
        if self.coefficients is not None:
            weights = self.coefficients.float()  # ZeRO-3 in bf16 can't keep them fp32
        return merge_norm(y_BTD, stages, weights, backend=backend).merged, stages[-1]


def classic_weights(order: int, device: torch.device | None = None) -> Tensor:
    """The γ of the classic methods, fp32 [order]; made on the device, where a copy would wait for it."""
    if order == 2:
        return torch.full((2,), 0.5, dtype=torch.float32, device=device)
    weights = torch.full((4,), 1.0 / 6.0, dtype=torch.float32, device=device)
    weights[1:3] *= 2.0
    return weights


def evaluate_stages(
    order: int,
    y_BTD: Tensor,
    increment_fn: IncrementFn,
    inner_coefficients: Tensor | None = None,
) -> list[Tensor]:
    """The stages F_1 … F_order of a Runge-Kutta step from y, each [B, T, D]; ``inner_coefficients``: β_21,
    β_31, β_32, … instead of the classic ones, each stage from the one before."""
    stages = [increment_fn(y_BTD, None, 0)]
    for i, length in enumerate(STEP_LENGTHS[order], start=1):
        merged, scale = stages[-1:], None
        if inner_coefficients is not None:
            first = i * (i - 1) // 2
            merged, scale = stages, inner_coefficients.float()[first : first + i]
        elif length != 1.0:
            scale = torch.full((1,), length, dtype=torch.float32, device=y_BTD.device)
        x_BTD, normed = increment_fn.input_of(y_BTD, merged, scale)
        stages.append(increment_fn(x_BTD, normed, i))
    return stages
