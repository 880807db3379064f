"""The embedding with the vocabulary split over the tensor-parallel ranks.

Shapes: B batch, T sequence, S this rank's part of it, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.parallel.shard import Shard
from megatron_iiet.parallel.tensor import TensorParallel, mark_sharded

IGNORED = -100
"""The target of a token whose prediction does not count; its loss is 0, and so is its gradient."""


class VocabularyEmbedding(nn.Module):
    """An embedding whose rows are split over the tensor-parallel ranks; leaves a block (one collective)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.parallel = parallel
        shard = Shard(0, (num_embeddings,))
        rows, _ = shard.local_shape((num_embeddings, embedding_dim), parallel.group.size)
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim))
        mark_sharded(self.weight, shard, parallel.group.size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] → [B, T, D], or [B, S, D] under sequence parallelism."""
        if self.parallel.group.size == 1:
            return F.embedding(tokens_BT, self.weight)
        rows = self.weight.shape[0]
        local_BT = tokens_BT - self.parallel.group.rank * rows
        elsewhere_BT = (local_BT < 0) | (local_BT >= rows)
        found_BTD = F.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return self.parallel.leave(found_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0.0))
