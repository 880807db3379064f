"""The iterative implicit Euler step as the IIET paper writes it, and DLCL as its r = 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.models.history import History
from megatron_iiet.models.solvers.base import IncrementFn, Solver, fp32_parameter, initial_row
from megatron_iiet.ops import merge_norm


class ImplicitEuler(Solver):
    """Iterative implicit Euler (IIET, arXiv 2509.22463, Algorithm 1)::

        base = y_n + Σ_{j<n} α_{n,j} F̃_j
        y^0  = base + α_{n,n} F(y_n)                 predictor 'merged'
        y^0  = y_n + F(y_n)                          predictor 'euler' (Eq. 10 read literally)
        y^i  = base + α_{n,n} f^i,                   i = 1..r
               f^i = (1 − ω) f^{i-1} + ω F(y^{i-1})
        y_{n+1} = y^r,  F̃_n = f^r

    ``coefficients``: fp32 [n + 1], α_{n,0} … α_{n,n}, shared by all iterations.

    ``history_norm='rms'`` keeps F̃_n / rms(F̃_n) for later layers: what they merge has one scale, whatever the
    layer it is from. ω = ``damping`` below 1 damps the iteration. (Neither is in the paper.)
    """

    iterative = True

    def __init__(
        self,
        layer: int,
        *,
        iterations: int,
        predictor: str = "merged",
        damping: float = 1.0,
        coefficient_init: str,
        history_norm: str = "none",
        backend: str,
    ) -> None:
        super().__init__(iterations)
        self.damping = damping
        self.history_norm = history_norm
        self.layer = layer
        self.predictor = predictor
        self.backend = backend
        self.coefficients = fp32_parameter(initial_row(layer + 1, coefficient_init))

    @property
    def coefficient_rows(self) -> list[nn.Parameter]:
        return [self.coefficients]

    @property
    def merged_entries(self) -> int:
        return 0 if self.predictor == "euler" and self.iterations == 0 else self.layer

    def step(self, y_BTD: Tensor, increment_fn: IncrementFn, history: History) -> tuple[Tensor, Tensor]:
        norm = increment_fn.input_norm
        f = increment_fn(y_BTD, None, 0)
        if self.predictor == "euler" and self.iterations == 0:
            return y_BTD + f, self.kept(f)  # plain Transformer++: there is no corrector to merge in
        if self.iterations == 0:  # nothing needs the base alone: all in one pass
            (iterate,) = history.merge(y_BTD, (self.coefficients,), self.layer, own=f)
            self.observe(0, y_BTD, iterate)
            return iterate, self.kept(f)
        (base,) = history.merge(y_BTD, (self.coefficients,), self.layer)
        own = self.coefficients.float()[-1:]  # ZeRO-3 in bf16 can't keep them fp32
        iterate = y_BTD
        for i in range(self.iterations + 1):
            before = iterate
            plain = i == 0 and self.predictor == "euler"
            iterate, normed = merge_norm(
                y_BTD if plain else base,
                (f,),
                None if plain else own,
                norm.weight if i < self.iterations else None,
                eps=norm.eps,
                backend=self.backend,
            )
            self.observe(i, before, iterate)
            if i < self.iterations:
                new = increment_fn(iterate, normed, i + 1)
                f = new if self.damping == 1 else torch.lerp(f, new, self.damping)
        return iterate, self.kept(f)

    def kept(self, f_BTD: Tensor) -> Tensor:
        """What later layers merge of the last increment."""
        return f_BTD if self.history_norm == "none" else F.rms_norm(f_BTD, f_BTD.shape[-1:])


class DLCL(ImplicitEuler):
    """Dynamic linear combination of layers (Wang et al. 2019): the merge without the corrector::

    y_{n+1} = y_n + α_{n,n} F(y_n) + Σ_{j<n} α_{n,j} F̃_j
    """

    iterative = False

    def __init__(
        self, layer: int, *, coefficient_init: str, history_norm: str = "none", backend: str
    ) -> None:
        super().__init__(
            layer,
            iterations=0,
            coefficient_init=coefficient_init,
            history_norm=history_norm,
            backend=backend,
        )
