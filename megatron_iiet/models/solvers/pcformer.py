"""Runge-Kutta predictor and multistep corrector: PCformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Place, Solver, fp32_parameter, initial_row
from megatron_iiet.models.solvers.runge_kutta import evaluate_stages

KEPT_MERGED = 3
"""Increments of earlier layers in the corrector."""


class PCformer(Solver[solvers.PCformer]):
    """Predictor-corrector step (PCformer, Li et al. 2024, arXiv 2411.03042) of predictor order o = 2 or 4::

        F_1 … F_o      stages of a Runge-Kutta step from y_n (:func:`evaluate_stages`)
        y_p     = y_n + Σ_{i=1..o} γ (1-γ)^{o-i} F_i                        predictor
        F̃_n     = F(y_p)
        y_{n+1} = y_n + α F̃_n + β_1 F̃_{n-1} + β_2 F̃_{n-2} + β_3 F̃_{n-3}    corrector

    The first layers have fewer terms. The paper counts times: its F_t is what the step that *led to* y_t
    evaluated, so that its four-step corrector F_{t+1}, F_t, F_{t-1}, F_{t-2} is the layer's own increment and
    those of the three layers before it. A reading with the layer's own increment inside the sum is contained
    in this one: it would only add to α.

    ``gamma``: fp32 [1], from 0.5. ``coefficients``: fp32 [k + 1] with k = min(3, n), in the order of the
    history: β_k … β_1, α; ``identity`` starts from α = 1, β = 0, ``average`` from 1/(k + 1) each.
    """

    def __init__(self, declared: solvers.PCformer, place: Place) -> None:
        super().__init__(declared, place)
        self.first_merged = max(0, place.layer - KEPT_MERGED)
        self.merged_entries = place.layer - self.first_merged
        self.gamma = fp32_parameter(torch.full((1,), 0.5))
        self.coefficients = fp32_parameter(
            initial_row(self.merged_entries + 1, declared.resolved_coefficient_init)
        )

    @property
    def coefficient_rows(self) -> list[nn.Parameter]:
        return [self.coefficients]

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        order = self.declared.predictor_order
        stages = evaluate_stages(order, y_BTD, increment_fn)
        gamma = self.gamma.float()  # ZeRO-3 in bf16 can't keep it fp32
        weights = torch.cat([gamma * (1 - gamma) ** (order - i) for i in range(1, order + 1)])
        predicted, normed = increment_fn.input_of(y_BTD, stages, weights)
        self.observe(0, y_BTD, predicted)
        f = increment_fn(predicted, normed, order)
        (corrected,) = history.merge(
            y_BTD, (self.coefficients,), self.merged_entries, own=f, first=self.first_merged
        )
        self.observe(1, predicted, corrected)
        return corrected, f
