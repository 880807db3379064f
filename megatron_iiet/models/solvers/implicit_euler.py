"""The iterative implicit Euler step as the IIET paper writes it, and DLCL, its r = 0."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.config import solvers
from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Place, Solver, fp32_parameter, initial_row
from megatron_iiet.ops import merge_norm

Merged = TypeVar("Merged", bound=solvers.MergingAll)


class DLCL(Solver[Merged], Generic[Merged]):
    """Dynamic linear combination of layers (Wang et al. 2019), the merge without a corrector::

        y_{n+1} = y_n + α_{n,n} F(y_n) + Σ_{j<n} α_{n,j} F̃_j

    ``coefficients``: fp32 [n + 1], α_{n,0} … α_{n,n}. ``history_norm='rms'`` keeps F̃_n / rms(F̃_n) for later
    layers: what they merge has one scale, whatever the layer it is from. (It is in no paper.)
    """

    def __init__(self, declared: Merged, place: Place) -> None:
        super().__init__(declared, place)
        self.merged_entries = place.layer
        self.history_norm = declared.history_norm
        self.coefficients = fp32_parameter(initial_row(place.layer + 1, declared.resolved_coefficient_init))

    @property
    def coefficient_rows(self) -> list[nn.Parameter]:
        return [self.coefficients]

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        f = increment_fn(y_BTD, None, 0)
        # Nothing needs the base alone: all in one pass.
        (merged,) = history.merge(y_BTD, (self.coefficients,), self.merged_entries, own=f)
        self.observe(0, y_BTD, merged)
        return merged, self.kept(f)

    def kept(self, f_BTD: Tensor) -> Tensor:
        """What later layers merge of the last increment."""
        return f_BTD if self.history_norm == "none" else F.rms_norm(f_BTD, f_BTD.shape[-1:])


class ImplicitEuler(DLCL[solvers.IIET]):
    """Iterative implicit Euler (IIET, arXiv 2509.22463, Algorithm 1)::

        base = y_n + Σ_{j<n} α_{n,j} F̃_j
        y^0  = base + α_{n,n} F(y_n)                 predictor 'merged'
        y^0  = y_n + F(y_n)                          predictor 'euler' (Eq. 10 read literally)
        y^i  = base + α_{n,n} f^i,                   i = 1..r
               f^i = (1 − ω) f^{i-1} + ω F(y^{i-1})
        y_{n+1} = y^r,  F̃_n = f^r

    The coefficients are shared by all iterations. ω = ``damping`` below 1 damps the iteration (not in the
    paper). With ``merge`` false there are none, and the base is y_n: implicit Euler by itself (Eq. 9).
    """

    def __init__(self, declared: solvers.IIET, place: Place) -> None:
        super().__init__(declared, place)
        self.keeps = declared.merge
        if not declared.merge:
            self.register_parameter("coefficients", None)

    @property
    def history_reads(self) -> range:
        merges = self.iterations or self.declared.merges_without_iterations
        return super().history_reads if self.declared.merge and merges else range(0)

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        merge, damping = self.declared.merge, self.declared.damping
        plain_predictor = not merge or self.declared.predictor == "euler"
        if self.iterations == 0:
            if not plain_predictor:
                return super().step(y_BTD, increment_fn, history)
            f = increment_fn(y_BTD, None, 0)
            return y_BTD + f, self.kept(f)  # plain Transformer++: there is no corrector to merge in
        f = increment_fn(y_BTD, None, 0)
        base, own = y_BTD, None
        if merge:
            (base,) = history.merge(y_BTD, (self.coefficients,), self.merged_entries)
            own = self.coefficients.float()[-1:]  # ZeRO-3 in bf16 can't keep them fp32
        iterate = y_BTD
        for i in range(self.iterations + 1):
            before = iterate
            terms = (y_BTD, (f,), None) if i == 0 and plain_predictor else (base, (f,), own)
            if i < self.iterations:
                iterate, normed = increment_fn.input_of(*terms)
                new = increment_fn(iterate, normed, i + 1)
                f = new if damping == 1 else torch.lerp(f, new, damping)
            else:
                iterate = merge_norm(*terms, backend=self.place.backend).merged
            self.observe(i, before, iterate)
        return iterate, self.kept(f)
