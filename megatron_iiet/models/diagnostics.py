"""What the corrector does: is the fixed-point iteration contracting, and does it still change anything?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_iiet.models.transformer import Transformer


@dataclass
class IterateStatistics:
    """Means over this rank's tokens, by (layer, iterate); zeros where no sequence counts."""

    relative_residual: dict[tuple[int, int], float] = field(default_factory=dict)
    """‖y^i − y^{i−1}‖ / ‖y^i‖; falls with i where the iteration contracts. Iterate 0 is against y_n."""
    influence: dict[tuple[int, int], float] = field(default_factory=dict)
    """1 − cos(y^{i−1}, y^i): iteration influence (IIET paper, section 4)."""

    def update(self, other: IterateStatistics) -> None:
        """Take over the layers of another part of the model."""
        self.relative_residual |= other.relative_residual
        self.influence |= other.influence

    def add(
        self, layer: int, iterate: int, before: Tensor, after: Tensor, weights_B: Tensor | None = None
    ) -> None:
        """Take the mean over [B, T, D]; ``weights_B``: of the sequences (default: equal)."""
        before32, after32 = before.float(), after.float()

        def mean(values_BT: Tensor) -> float:
            if weights_B is None:
                return values_BT.mean().item()
            return (values_BT.mean(-1) @ weights_B / weights_B.sum().clamp(min=1.0)).item()

        residual = (after32 - before32).norm(dim=-1) / after32.norm(dim=-1)
        self.relative_residual[layer, iterate] = mean(residual)
        # 1 - cos = ½ ‖â − b̂‖²; the left side would leave only the rounding of small influences.
        turn = F.normalize(after32, dim=-1) - F.normalize(before32, dim=-1)
        self.influence[layer, iterate] = mean(0.5 * turn.square().sum(-1))


@contextmanager
def observe_iterates(model: Transformer, weights_B: Tensor | None = None) -> Iterator[IterateStatistics]:
    """Collect statistics of every forward pass inside the block; the last pass counts.

    ``weights_B``: of the sequences, e.g. those of a validation batch, whose fillers have none.
    """
    statistics = IterateStatistics()
    for n, solver in model.solvers.items():
        solver.observer = partial(statistics.add, n, weights_B=weights_B)
    try:
        with torch.no_grad():
            yield statistics
    finally:
        for solver in model.solvers.values():
            solver.observer = None
