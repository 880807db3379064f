"""What the corrector does: is the fixed-point iteration contracting, and does it still change anything?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
        self.influence[layer, iterate] = mean(one_minus_cosine(before32, after32))


@contextmanager
def observe_iterates(model: Transformer, weights_B: Tensor | None = None) -> Iterator[IterateStatistics]:
    """Collect statistics of every forward pass inside the block; the last pass counts.

    ``weights_B``: of the sequences, e.g. those of a validation batch, whose fillers have none.
    """
    statistics = IterateStatistics()
    with _observing(model, partial(statistics.add, weights_B=weights_B)):
        yield statistics


@contextmanager
def _observing(model: Transformer, observer: Callable[[int, int, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block ``observer`` is called with the layer and what its solver shows of every iterate."""
    for n, solver in model.solvers.items():
        solver.observer = partial(observer, n)
    try:
        with torch.no_grad():
            yield
    finally:
        for solver in model.solvers.values():
            solver.observer = None


InfluenceSums = dict[tuple[int, int | None], Tensor]
"""Sums over tokens of influence, and their number, fp64 [2], by (layer, iterate): of 1 − cos(y^{i−1}, y^i),
iterate 0 against y_n; iterate None: of 1 − cos(y_n, y_{n+1}), block influence (ShortGPT, Men et al. 2024).
Parts of a text, of a sequence or of the layers add up."""


@contextmanager
def observe_influence(model: Transformer, counted_BT: Tensor) -> Iterator[InfluenceSums]:
    """Sums of the influence of all iterates and layers in one forward pass inside the block.

    ``counted_BT``: which tokens count, of those whose streams are on this rank. Nothing waits for the device.
    """
    sums: InfluenceSums = {}
    counted = counted_BT.to(torch.float64)

    def note(layer: int, iterate: int | None, before: Tensor, after: Tensor) -> None:
        values_BT = one_minus_cosine(before.float(), after.float())
        sums[layer, iterate] = torch.stack(((values_BT * counted).sum(), counted.sum()))

    def on_layer(layer: int, module: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        note(layer, None, inputs[0], outputs[0])

    hooks = [
        layer.register_forward_hook(partial(on_layer, int(name))) for name, layer in model.layers.items()
    ]
    try:
        with _observing(model, note):
            yield sums
    finally:
        for hook in hooks:
            hook.remove()


def one_minus_cosine(before: Tensor, after: Tensor) -> Tensor:
    """1 − cos of the angle between vectors: fp32 [..., D], [..., D] → [...]."""
    # 1 - cos = ½ ‖â − b̂‖²; the left side would leave only the rounding of small influences.
    turn = F.normalize(after, dim=-1) - F.normalize(before, dim=-1)
    return 0.5 * turn.square().sum(-1)
