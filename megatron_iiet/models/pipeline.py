"""One pipeline stage, what crosses the boundary to the next, and where the boundaries are.

The residual stream and the history that later layers still merge travel as one packed tensor
[1 + k, B, T, D]: one message each way, and one walk through the stage's graph in the backward pass. Under
sequence parallelism T is a rank's part of the sequence.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from megatron_iiet.config import RunConfig
from megatron_iiet.models.history import History
from megatron_iiet.models.iterations import mean_evaluations
from megatron_iiet.models.transformer import IntegratedLayer, Transformer
from megatron_iiet.parallel.stages import StagePlan, plan_stages


class PipelineStage(nn.Module):
    """A stage as a function of one tensor: token ids in the first, packed stream elsewhere; the last one
    returns its stream, which the loss is made of."""

    def __init__(self, model: Transformer, sequence_length: int) -> None:
        super().__init__()
        self.model = model
        self.sequence_length = sequence_length
        self.entries_received = self.entries_handed_on = range(0)
        """History entries that come from the stage before and go to the next; see :meth:`resize`."""

    def resize(self, full_model: Transformer) -> None:
        """Receive and hand on what :func:`entries_crossing` says of ``full_model``."""
        layers = self.model.solvers
        self.entries_received = entries_crossing(full_model, min(layers))
        self.entries_handed_on = entries_crossing(full_model, max(layers) + 1)

    def forward(self, x: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """``positions_BT``: of the micro-batch's tokens, see :meth:`Transformer.forward`."""
        y_BTD, history = self.unpack(x)
        y_BTD = self.model.integrate(y_BTD, history, self.sequence_length, positions_BT)
        return y_BTD if self.model.is_last else self.pack(y_BTD, history)

    def unpack(self, x: Tensor) -> tuple[Tensor, History]:
        """Stream and history before this stage's first layer."""
        if self.model.is_first:
            return self.model.embed(x)
        y_BTD, *entries = x.unbind(0)
        return y_BTD, self.model.start_history(entries, self.entries_received.start)

    def pack(self, y_BTD: Tensor, history: History) -> Tensor:
        """What the next stage unpacks."""
        return torch.stack([y_BTD, *history.read(self.entries_handed_on)])


def entries_crossing(full_model: Transformer, layer: int) -> range:
    """History entries that a stage that starts at ``layer`` must be given: from the first that any layer from
    there on merges to the newest there is. ``full_model``: all layers, with the iterations in force."""
    solvers = full_model.solvers.values()
    merges_embedding = any(s.merges_embedding and s.merging for s in solvers)
    kept = merges_embedding + sum(s.keeps_increment for n, s in full_model.solvers.items() if n < layer)
    reads = [s.history_reads for n, s in full_model.solvers.items() if n >= layer and s.history_reads]
    return range(min([kept, *(read.start for read in reads)]), kept)


def stage_plan(config: RunConfig, full_model: Transformer) -> StagePlan:
    """The cut of the layers of the whole model into pipeline stages, by FLOPs; the embedding has none.

    Raises:
        ValueError: more stages than layers.
    """
    length = config.data.sequence_length
    layers = [cast(IntegratedLayer, layer) for layer in full_model.layers.values()]
    costs = [
        layer.increment.forward_flops(length, count)
        for count, layer in zip(mean_evaluations(config), layers, strict=True)
    ]
    return plan_stages(costs, full_model.head_flops(length), config.parallel.pipeline)
