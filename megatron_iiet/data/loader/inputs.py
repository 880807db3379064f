"""From a batch of token windows to what the model is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_iiet.data.loader.batches import Batch
from megatron_iiet.data.loader.validation import ValidationBatch
from megatron_iiet.parallel.vocabulary import IGNORED


class Inputs(NamedTuple):
    """Arguments of :meth:`Transformer.forward`, on the model's device; B batch, T sequence."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the token after each; IGNORED where it does not count
    positions: Tensor | None  # int64 [B, T]: place of each token in its document; None: one document a sample
    divisor: float | None  # what the sum of the losses is divided by; None: their number

    @property
    def counted(self) -> Tensor:
        """Targets that count, int64 scalar."""
        return (self.targets != IGNORED).sum()


def inputs_of(batch: Batch | ValidationBatch, device: torch.device | str = "cpu") -> Inputs:
    """Windows of T + 1 tokens as T tokens and T targets.

    The first token of a document and padding are nobody's targets, nor is anything in a filler row. The loss
    of a training batch is its part of the mean over the global batch (:attr:`Batch.count`), that of a
    validation batch the sum over its targets.
    """
    tokens = batch.tokens.to(device, non_blocking=True)
    targets = tokens[:, 1:].contiguous()
    positions = divisor = None
    if batch.positions is not None:
        positions = batch.positions.to(device, non_blocking=True)
        targets = targets.masked_fill(positions[:, 1:] == 0, IGNORED)
        positions = positions[:, :-1].contiguous()
    if isinstance(batch, ValidationBatch):
        fillers_B = batch.weights.to(device, non_blocking=True) == 0
        targets = targets.masked_fill(fillers_B.unsqueeze(-1), IGNORED)
        divisor = 1.0
    elif positions is not None:
        # Where nothing counts in a whole global batch, there is nothing to learn: a loss of 0 and not 0 / 0.
        divisor = batch.count or 1.0
    return Inputs(tokens[:, :-1].contiguous(), targets, positions, divisor)
