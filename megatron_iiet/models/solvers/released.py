"""The iterative implicit Euler step as the IIET authors' released code computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import (
    LAYER_NORM_EPS,
    IncrementFn,
    Place,
    Solver,
    fp32_parameter,
    initial_row,
)
from megatron_iiet.ops import merge_norm


class ReleasedImplicitEuler(Solver[solvers.ReleasedIIET]):
    """Implicit Euler over normalised layer outputs, with a row of its own for the read-out.

    With G(h) = h + F(h), the history L_0 = embedding, L_1, …, and layers counted n = 1..N::

        L_n = LN^a(G(h))
        repeat r times:  h' = Σ_{j≤n} W[n,j] L_j ;  L_n = LN^b(G(h'))
        h = Σ_{j≤n} Wc[n,j] L_j                      input of layer n + 1

    The rows are stored N + 1 wide, and row 0 with the first layer, as in the authors' (N+1) × (N+1)
    matrices: their checkpoints map one to one. Entries right of the diagonal and row 0 are never read.
    Both rows read the older entries in one pass. ``readout='shared'`` has one row: Wc = W.
    """

    merges_embedding = True

    def __init__(self, declared: solvers.ReleasedIIET, place: Place) -> None:
        super().__init__(declared, place)
        width = place.width
        self.merged_entries = place.layer + 1  # the formula's n, which counts from 1
        self.predictor_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.corrector_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

        def row(n: int) -> Tensor:
            full = torch.zeros(place.num_layers + 1)
            full[: n + 1] = initial_row(n + 1, declared.resolved_coefficient_init)
            return full

        self.coefficients = fp32_parameter(row(self.merged_entries))
        self.shares_row = declared.readout == "shared"
        if not self.shares_row:
            self.readout_coefficients = fp32_parameter(row(self.merged_entries))
        if place.layer == 0:
            self.unused_row_0 = fp32_parameter(torch.stack((row(0), row(0))))

    @property
    def coefficient_rows(self) -> list[nn.Parameter]:
        if self.shares_row:
            return [self.coefficients]
        rows = [self.coefficients, self.readout_coefficients]
        return rows if self.iterations else rows[1:]

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        n = self.merged_entries
        stepped = y_BTD + increment_fn(y_BTD, None, 0)
        self.observe(0, y_BTD, stepped)  # before the norm, whose output has another scale than y
        output = self.predictor_norm(stepped)
        if self.iterations == 0:
            (h_BTD,) = history.merge(None, self.coefficient_rows, n, own=output)
            return h_BTD, output
        bases = history.merge(None, self.coefficient_rows, n)
        owns = [row.float()[n : n + 1] for row in self.coefficient_rows]
        for i in range(1, self.iterations + 1):
            before = output
            h_BTD, normed = increment_fn.input_of(bases[0], (output,), owns[0])
            output = self.corrector_norm(h_BTD + increment_fn(h_BTD, normed, i))
            self.observe(i, before, output)
        h_BTD = merge_norm(bases[-1], (output,), owns[-1], backend=self.place.backend).merged
        return h_BTD, output
